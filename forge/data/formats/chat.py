"""Conversations: only what the assistant wrote carries loss, with the token that ends each of its turns.

The text is that of the chat template (`forge.data.chat_template`), its tokens are those of
`forge.data.chat_encoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from forge.data.chat_encoder import ChatEncoder, EncodedText
from forge.data.chat_template import chat_template_of
from forge.data.conversations import conversation_of
from forge.data.formats.base import Example, FormatContext
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.errors import DataError

_CUT, _LOST = "conversations cut at seq_len", "turns lost by the cut"
_SHOWN_PER_TURN = "conversations shown once per turn"


class ChatFormat:
    """One example for a conversation; several if the template shows earlier turns differently later.

    An example longer than `seq_len` is cut at its end; the turns that are whole before it still carry loss.
    """

    def __init__(self, context: FormatContext) -> None:
        self._context = context
        template = chat_template_of(context.tokenizer, own=context.chat.template, key="data.format")
        self._encoder = ChatEncoder(context.tokenizer, seq_len=context.seq_len, template=template)

    def examples(self, record: Record) -> Iterator[Example]:
        conversation = conversation_of(record)
        try:
            encoded = self._encoder.chat(conversation, turns=self._context.chat.turns)
        except ValueError as error:
            raise DataError(f"{record.location}: {error}") from None
        self._context.noted.add(_SHOWN_PER_TURN, record, count=len(encoded) > 1)
        for one in encoded:
            yield self._example(one, record=record)

    def counts(self) -> Mapping[str, int]:
        return self._context.noted.counts

    def _example(self, encoded: EncodedText, *, record: Record) -> Example:
        ids = encoded.ids
        has_loss = np.zeros(len(ids), dtype=bool)
        for start, stop in encoded.turns:
            has_loss[start:stop] = True
        end = max((stop for _, stop in encoded.turns), default=0)  # nothing after it is learnt
        limit = self._context.seq_len + 1
        self._context.noted.add(_CUT, record, count=end > limit)
        self._context.noted.add(_LOST, record, count=sum(stop > limit for _, stop in encoded.turns))
        end = min(end, limit)
        targets = np.where(has_loss[1:end], ids[1:end], IGNORED)
        arrays = {"tokens": ids[: max(0, end - 1)], "targets": targets}
        return Example(arrays=arrays, weight=float((targets != IGNORED).sum()))
