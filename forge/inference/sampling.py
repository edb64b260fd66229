"""How the next token is chosen, and what is generated.

The choice is the largest of the filtered logits plus Gumbel noise, which samples from their softmax (Gumbel-max).
The noise of a token follows from the seed, the prompt and the position alone, so a text does not depend on which
others are generated beside it.

Source: Gumbel-max, https://arxiv.org/abs/1411.0030 section 2; top-p: arXiv 1904.09751; min-p: arXiv 2407.01082;
repetition penalty: arXiv 1909.05858, equation 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from forge.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor  # the client checks parameters and never imports torch

MIN_TEMPERATURE = 1e-5
"""Logits divided by less overflow fp32. Lower ones are refused: their text is that of temperature 0."""
_MAX_STOPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How texts are generated. Raises: ArgumentError naming a value out of range."""

    max_tokens: int = 128
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Sample among the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the probability of the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt and the text so far are divided by it if positive, multiplied if negative."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text, besides those of the model."""
    ignore_end: bool = False
    """Go on after a token that ends the text, for measurements."""
    num_beams: int = 1
    """Beam search with temperature 0."""
    length_penalty: float = 1.0
    """Of beam search, as in transformers."""
    n: int = 1
    """Texts for each prompt."""
    logprobs: int | None = None
    """Give the log-probability of each token and of this many likeliest ones; None: none."""

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            **{"max_tokens": (1, 2**24), "temperature": (0, 100), "top_p": (0, 1), "top_k": (0, 2**24)},
            **{"min_p": (0, 1), "repetition_penalty": (0.01, 100), "seed": (0, 2**63 - 1), "n": (1, 1024)},
            **{"num_beams": (1, 64), "length_penalty": (-10, 10), "logprobs": (0, 100)},
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(f"{name} is {value}; it must be from {low} to {high}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ArgumentError(f"temperature is {self.temperature}; it must be 0, or {MIN_TEMPERATURE} or more")
        if self.top_p == 0:
            raise ArgumentError("top_p is 0; it must be larger, or temperature 0 for the likeliest token")
        if len(self.stop) > _MAX_STOPS or "" in self.stop:
            raise ArgumentError(f"stop must be at most {_MAX_STOPS} strings, none of them empty")
        if self.num_beams > 1 and (self.temperature > 0 or self.n > self.num_beams or self.logprobs is not None):
            raise ArgumentError(
                "num_beams requires temperature 0, n of at most num_beams, and no logprobs: it does not sample"
            )
        if self.n > 1 and self.temperature == 0 and self.num_beams == 1:
            raise ArgumentError("n larger than 1 requires a temperature above 0: the likeliest text is only one")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One generated token."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generated text."""

    index: int
    """Number of the prompt."""
    number: int
    """Of the `n` texts of the prompt."""
    text: str
    """Without the prompt, special tokens and the stop string."""
    token_ids: tuple[int, ...]
    """With the token that ended it."""
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_tokens: int
    cut_tokens: int
    """Tokens of the prompt's beginning for which the model has no positions."""
    completion_tokens: int


def prompt_seed(prompt: Sequence[int], *, seed: int, number: int) -> int:
    """A seed for the noise of one text: of its prompt, the seed of the request and its number among `n`."""
    content = np.asarray([seed, number, *prompt], dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], *, num_tokens: int) -> Tensor:
    """Noise for the next token of several texts. Shapes: float32[len(seeds), num_tokens]."""
    import torch

    rows = []
    for seed, position in zip(seeds, positions, strict=True):
        uniform = np.random.Generator(np.random.Philox(key=[seed, position])).random(num_tokens)
        rows.append(-np.log(-np.log(np.clip(uniform, 1e-300, 1 - 1e-16))))
    return torch.from_numpy(np.stack(rows))


def penalised(logits: Tensor, seen: Tensor, *, penalty: float) -> Tensor:
    """Apply the repetition penalty. Shapes: logits: [n, V]; seen: bool[n, V]."""
    import torch

    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def scores(logits: Tensor, sampling: SamplingParams, *, noise: Tensor | None) -> Tensor:
    """What the next token is the largest of. Shapes: logits, noise, result: [n, V]; noise None at temperature 0."""
    if sampling.temperature == 0 or noise is None:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -np.inf)
    if sampling.min_p > 0:
        lowest = logits.amax(dim=-1, keepdim=True) + float(np.log(sampling.min_p))
        logits = logits.masked_fill(logits < lowest, -np.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(dim=-1)
        is_beyond = shares.cumsum(dim=-1) - shares >= sampling.top_p  # of those before it
        logits = logits.masked_fill(is_beyond.scatter(-1, order, is_beyond), -np.inf)
    return logits + noise.to(logits)
