"""Preference pairs: a prompt with two answers, which alone carry loss, each with the token that ends it.

An example has two parts, one after the other: the prompt with the chosen answer, and the prompt with the rejected
one. The array `part` is 1 and 2 there. Its weight is 1: a pair is one term of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge.data.chat_encoder import ChatEncoder, EncodedText
from forge.data.chat_template import chat_template_of, find_chat_template
from forge.data.conversations import ASSISTANT, Conversation, Message
from forge.data.formats.base import Example, FormatContext
from forge.data.preference_pairs import ChatPair, TextPair, as_chat, pair_of
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.errors import DataError

CHOSEN, REJECTED = 1, 2
"""Values of `part`."""

_CUT = "pairs cut: longer than seq_len with both answers"
_NO_ROOM = "pairs dropped: the prompt leaves no room for an answer"
_SAME = "pairs dropped: both answers are the same"
_SAME_CUT = "pairs dropped: both answers are the same up to the cut"


class PreferenceFormat:
    """One example for a pair.

    If both parts together are longer than `seq_len`, the longer one is cut at its end to what the other leaves, but
    to no less than half of `seq_len`.
    """

    def __init__(self, context: FormatContext) -> None:
        self._seq_len, self._noted = context.seq_len, context.noted
        texts, own = context.preference.texts, context.chat.template
        template = (
            chat_template_of(context.tokenizer, own=own, key="data.preference.texts")
            if texts == "chat"
            else find_chat_template(context.tokenizer, own=own)
        )
        self._has_template = template is not None
        self._are_texts_chat = template is not None and texts != "plain"
        self._encoder = ChatEncoder(context.tokenizer, seq_len=context.seq_len, template=template)

    def examples(self, record: Record) -> Iterator[Example]:
        pair = pair_of(record)
        if pair.chosen == pair.rejected:
            self._noted.add(_SAME, record)
            return
        try:
            chosen, rejected = self._encoded(pair)
        except ValueError as error:
            raise DataError(f"{record.location}: {error}") from None
        example = self._example(_Side.of(chosen), _Side.of(rejected), record=record)
        if example is not None:
            yield example

    def counts(self) -> Mapping[str, int]:
        return self._noted.counts

    def _encoded(self, pair: TextPair | ChatPair) -> tuple[EncodedText, EncodedText]:
        if isinstance(pair, TextPair) and self._are_texts_chat:
            pair = as_chat(pair)
        if isinstance(pair, TextPair):
            return (
                self._encoder.text(pair.prompt, answer=pair.chosen),
                self._encoder.text(pair.prompt, answer=pair.rejected),
            )
        if not self._has_template:
            raise ValueError(
                "the pair has lists of messages, which need a chat template, and the tokenizer has none. Set "
                "data.tokenizer.from_pretrained to a chat model, or data.chat.template to a Jinja file"
            )
        return self._chat(pair, answer=pair.chosen), self._chat(pair, answer=pair.rejected)

    def _chat(self, pair: ChatPair, *, answer: tuple[Message, ...]) -> EncodedText:
        """Encode one side; only the assistant's turns of the answer carry loss."""
        num_turns = sum(message["role"] == ASSISTANT for message in answer)
        conversation = Conversation(messages=(*pair.prompt, *answer), tools=pair.tools)
        encoded = self._encoder.chat(conversation, turns=num_turns)
        if len(encoded) > 1:
            raise ValueError(
                f"an answer has {num_turns} turns of the assistant, and the chat template shows earlier turns "
                "differently once another follows, so that it cannot be learnt as one; give answers of one turn"
            )
        return encoded[0]

    def _example(self, chosen: _Side, rejected: _Side, *, record: Record) -> Example | None:
        """Join two sides; None if they do not fit, or the cut leaves no difference."""
        lengths = _lengths(chosen.length, rejected.length, most=self._seq_len)
        cut = [side.cut(length) for side, length in zip((chosen, rejected), lengths, strict=True)]
        if not all((side.targets != IGNORED).any() for side in cut):
            self._noted.add(_NO_ROOM, record)
            return None
        if all(np.array_equal(getattr(cut[0], name), getattr(cut[1], name)) for name in ("tokens", "targets")):
            self._noted.add(_SAME_CUT, record)
            return None
        self._noted.add(_CUT, record, count=lengths != (chosen.length, rejected.length))
        parts = [np.full(side.length, part) for side, part in zip(cut, (CHOSEN, REJECTED), strict=True)]
        arrays = {
            "tokens": np.concatenate([side.tokens for side in cut]),
            "targets": np.concatenate([side.targets for side in cut]),
            "part": np.concatenate(parts),
        }
        return Example(arrays=arrays, weight=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """A prompt with one answer. Shapes: tokens, targets: int64[length]."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]

    @classmethod
    def of(cls, encoded: EncodedText) -> _Side:
        has_loss = np.zeros(len(encoded.ids), dtype=bool)
        for start, stop in encoded.turns:
            has_loss[start:stop] = True
        end = max((stop for _, stop in encoded.turns), default=0)  # nothing after it is learnt
        targets = np.where(has_loss[1:end], encoded.ids[1:end], IGNORED)
        return cls(tokens=encoded.ids[: max(0, end - 1)], targets=targets)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> _Side:
        return _Side(tokens=self.tokens[:length], targets=self.targets[:length])


def _lengths(first: int, second: int, *, most: int) -> tuple[int, int]:
    """Shorten two lengths until their sum is `most`: the longer one first, neither below half of `most`."""
    if first + second <= most:
        return first, second
    half = most // 2
    if first <= half:
        return first, most - first
    if second <= half:
        return most - second, second
    return half, half
