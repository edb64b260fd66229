"""Metrics of log-likelihoods: perplexity, bits per byte, and how often greedy decoding writes the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import sparse

from forge.errors import DataError
from forge.evaluate.metrics.base import Floats, ScoredExample, dense, ratio
from forge.objective.registry import Direction

_UNITS = {"token": 1, "byte": 2, "word": 3}


def likelihood_row(example: ScoredExample) -> list[float]:
    """The negative log-likelihood in nats of the text of an example, and its tokens, bytes (UTF-8) and words.

    Words are what blanks separate; Python's `str.split`, as lm-eval's `word_perplexity` up to empty words.
    """
    if not len(example.log_likelihoods) == len(example.choices) == len(example.num_tokens) == 1:
        raise DataError("an example without one text, its log-likelihood and its number of tokens")
    text = example.choices[0]
    counts = example.num_tokens[0], len(text.encode("utf-8", "surrogatepass")), len(text.split())
    return [-example.log_likelihoods[0], *map(float, counts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """exp(negative log-likelihood of all texts / their number of tokens, words or bytes)."""

    unit: str

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {self._name: "min"}

    @property
    def of_examples(self) -> tuple[str, ...]:
        return (self._name,)

    @property
    def signature(self) -> str:
        return f"perplexity|unit:{self.unit}"

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return dense(map(likelihood_row, examples), width=4)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        with np.errstate(over="ignore"):
            return {self._name: np.exp(ratio(sums[:, 0], sums[:, _UNITS[self.unit]]))}

    @property
    def _name(self) -> str:
        return "perplexity" if self.unit == "token" else f"{self.unit}_perplexity"


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsPerByte:
    """Negative log-likelihood in bits by the bytes of the texts, which no tokenizer changes."""

    signature: ClassVar[str] = "bits_per_byte|text:utf-8"
    directions: ClassVar[Mapping[str, Direction]] = {"bits_per_byte": "min"}
    of_examples: ClassVar[tuple[str, ...]] = ("bits_per_byte",)

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return dense(map(likelihood_row, examples), width=4)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        return {"bits_per_byte": ratio(sums[:, 0], sums[:, 2]) / math.log(2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyAccuracy:
    """The share of examples whose target greedy decoding would write, token for token."""

    signature: ClassVar[str] = "greedy_accuracy"
    directions: ClassVar[Mapping[str, Direction]] = {"greedy_accuracy": "max"}
    of_examples: ClassVar[tuple[str, ...]] = ("greedy_accuracy",)

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        if any(example.is_greedy is None for example in examples):
            raise DataError(
                "greedy_accuracy is not defined for this model: it does not decode texts token by token"
            )
        return dense(((float(bool(example.is_greedy)), 1.0) for example in examples), width=2)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        return {"greedy_accuracy": ratio(sums[:, 0], sums[:, 1])}
