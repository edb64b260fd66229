"""One text that is being written: its tokens, its state in the engine, and the text that may be sent."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from random import Random
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from forge.inference.drafts import Drafts
from forge.inference.sampling import SamplingParams


class TextStream:
    """Turns tokens into text piece by piece.

    Held back are bytes that are not yet a whole character, and text with which a stop string may begin.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Items[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(filter(None, stop))
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = 0
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """Add a token, and return the text that is certain now; sets `stopped_by` if a stop string is complete."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._decoded += len(text)
        return self._release(text)

    def finish(self) -> str:
        """Return the text that was held back."""
        if self.stopped_by is not None:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        text = self._release(whole[self._decoded :])
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            certain, self._held = self._held[:at], ""
            return certain
        longest = max(map(len, self._stop), default=1) - 1
        keep = next(
            (size for size in range(min(longest, len(self._held)), 0, -1) if self._may_stop(self._held[-size:])), 0
        )
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _may_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)


class RunningSequence:
    """One of the `n` texts of a request, from its submission to its last token.

    Args:
        is_repeatable: whether the text must not depend on what else runs.
        leader: the first text of the same request, whose prompt is computed first and then reused; None for itself.
    """

    def __init__(
        self,
        *,
        request_id: str,
        index: int,
        prompt: Items[int],
        sampling: SamplingParams,
        adapter: str | None,
        is_repeatable: bool,
        tokenizer: Tokenizer,
        leader: RunningSequence | None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.sampling = sampling
        self.adapter = adapter
        self.leader = leader
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.num_prefill = len(prompt)
        """Tokens that are computed in pieces; each later one has a step of its own."""
        self.num_computed = 0
        """Tokens whose keys and values are in the row."""
        self.num_cached = 0
        """Tokens of the prompt that were reused and not computed."""
        self.arrival = 0
        self.text = TextStream(tokenizer, stop=sampling.stop)
        self.drafts = Drafts()
        self.is_repeatable = is_repeatable
        self.random = Random(f"{sampling.seed}/{index}")

    @property
    def num_written(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_complete(self) -> bool:
        """Whether every token is computed, so that the next one can be chosen."""
        return self.num_computed == len(self.tokens)

    def append(
        self, token_id: int, *, ends: Collection[int], max_length: int
    ) -> tuple[str, Literal["stop", "length"] | None]:
        """Add a written token. Returns: the text that is certain now, and why the text ends, if it does.

        Args:
            ends: tokens that end a text of this model.
            max_length: most tokens of prompt and text together.
        """
        self.tokens.append(token_id)
        sampling = self.sampling
        text = ""
        reason: Literal["stop", "length"] | None = None
        if token_id in sampling.stop_ids or (token_id in ends and not sampling.ignore_end):
            reason = "stop"
        else:
            text = self.text.push(token_id)
            if self.text.stopped_by is not None:
                reason = "stop"
            elif self.num_written >= sampling.max_tokens or len(self.tokens) >= max_length:
                reason = "length"
        if reason is not None:
            text += self.text.finish()
            reason = "stop" if self.text.stopped_by is not None else reason
        return text, reason

    def restart(self) -> None:
        """Forget the row. Written tokens of a repeatable text are computed one by one again, as the first time."""
        self.num_computed = 0
        if not self.is_repeatable:
            self.num_prefill = len(self.tokens)
