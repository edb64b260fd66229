"""Conversations: only what the assistant wrote carries loss, with the token that ends each of its turns.

The text is that of the chat template (`forge.data.chat_template`). Names of special tokens inside a message are
ordinary characters unless `data.special_tokens` is `tokens`, so that no message can end its turn or begin another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from forge.data.chat_template import RenderedChat, chat_template_of
from forge.data.conversations import Conversation, conversation_of
from forge.data.formats.base import Example, FormatContext
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.errors import DataError

_FIRST_STAND_IN = 0xF0000
"""Private-use characters stand for names of special tokens in messages while a template is rendered."""


_MAX_CHARS_PER_TOKEN = 256
"""A conversation with more characters for each token of a row is not a long one but another kind of record."""

_Tokens = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Ids int64[n], and the characters [start, stop) of each, int64[n, 2]."""


class ChatFormat:
    """One example for a conversation; several if the template shows earlier turns differently later.

    An example longer than `seq_len` is cut at its end; the turns that are whole before it still carry loss.
    """

    def __init__(self, context: FormatContext) -> None:
        self._context = context
        self._template = chat_template_of(context.tokenizer, own=context.chat.template)
        self._names = self._template.special_tokens if context.tokenizer.special_tokens == "text" else ()
        self._parser = Tokenizer.from_str(context.tokenizer.content)
        self._plain = Tokenizer.from_str(context.tokenizer.content)
        self._plain.encode_special_tokens = True
        self._counts = dict.fromkeys(
            ("conversations cut at seq_len", "turns lost by the cut", "conversations shown once per turn"), 0
        )

    def examples(self, record: Record) -> Iterator[Example]:
        conversation = conversation_of(record)
        try:
            stand_ins = _stand_ins(conversation, names=self._names)
            rendered = self._template.render(_replaced(conversation, stand_ins), turns=self._context.chat.turns)
            names = {character: name for name, character in stand_ins.items()}
            encoded = [self._encoded(one, names=names) for one in rendered]
        except ValueError as error:
            raise DataError(f"{record.location}: {error}") from None
        except RecursionError:
            raise DataError(f"{record.location}: the conversation is nested too deeply") from None
        self._counts["conversations shown once per turn"] += len(rendered) > 1
        for one, tokens in zip(rendered, encoded, strict=True):
            yield self._example(one, tokens=tokens)

    def counts(self) -> Mapping[str, int]:
        return self._counts

    def _encoded(self, rendered: RenderedChat, *, names: Mapping[str, str]) -> _Tokens:
        """Encode a text. Raises: ValueError if it is too long to be cut with reason, or not Unicode."""
        most = self._context.seq_len * _MAX_CHARS_PER_TOKEN
        if len(rendered.text) > most:
            raise ValueError(
                f"the conversation has {len(rendered.text):,} characters, more than {most:,}, which is far beyond "
                f"data.seq_len: {self._context.seq_len}"
            )
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a surrogate pair is at character {error.start} of the rendered text") from None
        return self._encode(rendered.text, names=names)

    def _example(self, rendered: RenderedChat, *, tokens: _Tokens) -> Example:
        ids, offsets = tokens
        has_loss = np.zeros(len(ids), dtype=bool)
        last_tokens = []
        for start, stop in rendered.spans:
            # A token across the border counts, as in transformers' assistant_masks.
            inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
            if len(inside):
                has_loss[inside[0] : inside[-1] + 1] = True
                last_tokens.append(int(inside[-1]))
        end = max(last_tokens, default=-1) + 1  # nothing after it is learnt
        limit = self._context.seq_len + 1
        self._counts["conversations cut at seq_len"] += end > limit
        self._counts["turns lost by the cut"] += sum(last >= limit for last in last_tokens)
        end = min(end, limit)
        targets = np.where(has_loss[1:end], ids[1:end], IGNORED)
        arrays = {"tokens": ids[: max(0, end - 1)], "targets": targets}
        return Example(arrays=arrays, weight=float((targets != IGNORED).sum()))

    def _encode(self, text: str, *, names: Mapping[str, str]) -> _Tokens:
        """Encode a text in which characters stand for names. Returns: ids and their [start, stop) in the text.

        Shapes: int64[n], int64[n, 2].
        """
        parts: list[tuple[int, Encoding]] = []
        start = 0
        for at, character in enumerate(text) if names else ():
            if character in names:
                parts.append((start, self._parser.encode(text[start:at], add_special_tokens=False)))
                parts.append((at, self._plain.encode(names[character], add_special_tokens=False)))
                start = at + 1
        parts.append((start, self._parser.encode(text[start:], add_special_tokens=False)))
        ids = [token for _, part in parts for token in part.ids]
        offsets = [
            (at, at + 1) if text[at : at + 1] in names else (at + begin, at + end)
            for at, part in parts
            for begin, end in part.offsets
        ]
        return np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _stand_ins(conversation: Conversation, *, names: Sequence[str]) -> dict[str, str]:
    """Choose a character for each name of a special token that a message or a tool spells.

    Raises: ValueError if a conversation has such characters itself.
    """
    texts = list(_texts([conversation.messages, conversation.tools]))
    spelt = [name for name in names if any(name in text for text in texts)]
    chosen = {name: chr(_FIRST_STAND_IN + number) for number, name in enumerate(spelt)}
    if any(character in text for character in chosen.values() for text in texts):
        raise ValueError("a message has both names of special tokens and private-use characters from U+F0000")
    return chosen


def _texts(value: Any) -> Iterator[str]:
    """Every string in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _replaced(conversation: Conversation, stand_ins: Mapping[str, str]) -> Conversation:
    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            for name, character in stand_ins.items():
                value = value.replace(name, character)
            return value
        if isinstance(value, Mapping):
            return {replaced(key): replaced(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [replaced(item) for item in value]
        return value

    if not stand_ins:
        return conversation
    return replace(
        conversation,
        messages=tuple(replaced(message) for message in conversation.messages),
        tools=tuple(replaced(tool) for tool in conversation.tools),
    )
