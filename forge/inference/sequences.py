"""The texts that are being generated: what is chosen for each, when it ends, and whether it was close."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from forge.inference.exact import TIE, exact_logits, noise_bound, require_numbers
from forge.inference.loaded import LoadedModel
from forge.inference.sampling import (
    Generation,
    SamplingParams,
    TokenLogprob,
    gumbel_noise,
    penalised,
    prompt_seed,
    scores,
)


@dataclass(slots=True, kw_only=True)
class GrowingText:
    """One text. `prompt` is what the model continues; of an encoder-decoder the start token of the decoder."""

    index: int
    number: int
    prompt: tuple[int, ...]
    source: tuple[int, ...] = ()
    """Of an encoder-decoder."""
    cut_tokens: int = 0
    max_tokens: int
    seed: int
    ids: list[int] = field(default_factory=list)
    is_close: bool = False
    """Whether a token since `num_exact` was chosen by less than what batching can change."""
    num_exact: int = 0
    """Tokens that are known to be those of exact arithmetic."""
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a text ended, and what is left of it."""

    text: str
    reason: Literal["stop", "length"]


Watch = Callable[[int, int], bool]
"""Called with the number of a text and how many tokens of it are computed; returns whether its result is wanted."""


class Chooser:
    """Chooses next tokens, and finds out whether a text has ended.

    Args:
        watch: called after every token; a text that is not wanted any more ends with what it has.
    """

    def __init__(self, loaded: LoadedModel, sampling: SamplingParams, *, watch: Watch | None = None) -> None:
        self._loaded, self.sampling, self._watch = loaded, sampling, watch
        self._unwanted: set[int] = set()
        self._dtype = next(loaded.model.parameters()).dtype
        ends = () if sampling.ignore_end else loaded.end_ids
        self.ends = frozenset({*ends, *sampling.stop_ids})

    def text(self, *, index: int, number: int, prompt: Sequence[int]) -> GrowingText:
        """Begin a text, with the beginning of the prompt cut where the model has not enough positions."""
        prompt, cut, room = list(prompt) or [*self._loaded.end_ids[:1]], 0, self.sampling.max_tokens
        seed = prompt_seed(prompt, seed=self.sampling.seed, number=number)
        source: list[int] = []
        limit = self._loaded.max_positions
        if self._loaded.kind == "seq2seq":
            source, prompt = prompt, list(self._loaded.start_ids)
        if limit is not None:
            kept = max(1, limit - room, limit // 2)
            cut, prompt = max(0, len(prompt) - kept), prompt[-kept:]
            room = min(room, limit - len(prompt))
        return GrowingText(
            index=index,
            number=number,
            prompt=tuple(prompt),
            source=tuple(source),
            cut_tokens=cut,
            max_tokens=max(1, room),
            seed=seed,
        )

    def choose(self, logits: Tensor, texts: Sequence[GrowingText]) -> list[int]:
        """Return the next token of each text, and note where it was close. Shapes: logits: [n, V]."""
        logits = logits.float()
        found = self._scores(logits, texts, offsets=[len(text.ids) for text in texts])
        top = found.topk(min(2, found.shape[-1]), dim=-1)
        require_numbers(self._loaded, top.values[:, 0])
        bound = noise_bound(logits, dtype=self._dtype) / (self.sampling.temperature or 1.0)
        is_close = top.values[:, 0] - top.values[:, -1] < bound
        for text, close in zip(texts, is_close.tolist(), strict=True):
            text.is_close |= close
        for text in texts:
            self.is_wanted(text.index, len(text.ids) + 1)
        return [int(token) for token in top.indices[:, 0].tolist()]

    def is_wanted(self, index: int, num_tokens: int) -> bool:
        """Note tokens of a text. Returns: whether it is to be continued."""
        if self._watch is not None and not self._watch(index, num_tokens):
            self._unwanted.add(index)
        return index not in self._unwanted

    def needs_check(self, text: GrowingText, *, verifies: bool = True) -> bool:
        """Whether a finished text is compared with exact arithmetic.

        Args:
            verifies: whether the text could be another one in another batch.
        """
        is_open = (verifies and text.is_close) or self.sampling.logprobs is not None
        return is_open and text.index not in self._unwanted

    def correct(self, text: GrowingText) -> bool:
        """Compare a text with exact arithmetic, and cut it after the first token that differs, which is replaced.

        Returns: whether it was changed.
        """
        whole = [*text.prompt, *text.ids]
        first = len(text.prompt) + text.num_exact
        logits = exact_logits(self._loaded, whole, first=first, source=text.source)[:-1]
        positions = range(text.num_exact, len(text.ids))
        for row, position in zip(logits, positions, strict=True):
            chosen = self._exact_choice(row, text, position=position)
            if self.sampling.logprobs is not None:
                text.logprobs[position:] = [self._logprob(row, chosen)]
            is_other = chosen != text.ids[position]
            text.num_exact = position + 1
            if is_other:
                text.ids[position:], text.is_close = [chosen], False
                return True
        text.is_close = False
        return False

    def ending(self, text: GrowingText) -> Ending | None:
        """Why a text ends with its last token; None if it goes on."""
        is_end = bool(text.ids) and text.ids[-1] in self.ends
        stop = self.sampling.stop
        if stop:
            written = self._loaded.decode(text.ids)
            found = [at for at in (written.find(one) for one in stop) if at >= 0]
            if found:
                return Ending(text=written[: min(found)], reason="stop")
        if is_end or len(text.ids) >= text.max_tokens or text.index in self._unwanted:
            kept = text.ids[:-1] if is_end else text.ids
            return Ending(text=self._loaded.decode(kept), reason="stop" if is_end else "length")
        return None

    def generation(self, text: GrowingText, ending: Ending) -> Generation:
        return Generation(
            index=text.index,
            number=text.number,
            text=ending.text,
            token_ids=tuple(text.ids),
            finish_reason=ending.reason,
            logprobs=None if self.sampling.logprobs is None else tuple(text.logprobs),
            prompt_tokens=len(text.source or text.prompt),
            cut_tokens=text.cut_tokens,
            completion_tokens=len(text.ids),
        )

    def _scores(self, logits: Tensor, texts: Sequence[GrowingText], *, offsets: Sequence[int]) -> Tensor:
        if self.sampling.repetition_penalty != 1.0:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, (text, offset) in enumerate(zip(texts, offsets, strict=True)):
                seen[row, [*text.prompt, *text.ids[:offset]]] = True
            logits = penalised(logits, seen, penalty=self.sampling.repetition_penalty)
        noise = None
        if self.sampling.temperature > 0:
            noise = gumbel_noise([text.seed for text in texts], offsets, num_tokens=logits.shape[-1])
        return scores(logits, self.sampling, noise=noise)

    def _exact_choice(self, logits: Tensor, text: GrowingText, *, position: int) -> int:
        found = self._scores(logits[None], [text], offsets=[position])[0]
        return int(torch.nonzero(found >= found.max() - TIE)[0])

    def _logprob(self, logits: Tensor, token: int) -> TokenLogprob:
        shares = logits.log_softmax(dim=-1)
        top = shares.topk(min(self.sampling.logprobs or 0, len(shares)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return TokenLogprob(token_id=token, logprob=float(shares[token]), top=tuple(pairs))
