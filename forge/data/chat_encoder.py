"""Token ids of conversations in a chat template, and which of them the assistant wrote.

Names of special tokens inside a message are ordinary characters unless `data.special_tokens` is `parse`, so that
no message can end its turn or begin another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from forge.data.chat_template import ChatTemplate, RenderedChat, Turns
from forge.data.conversations import Conversation
from forge.data.tokenizer import TextTokenizer

_FIRST_STAND_IN = 0xF0000
"""Private-use characters stand for names of special tokens in messages while a template is rendered."""

_MAX_CHARS_PER_TOKEN = 256
"""A conversation with more characters for each token of a row is not a long one but another kind of record."""

_Tokens = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Ids int64[n], and the characters [start, stop) of each, int64[n, 2]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """Tokens of a text, and which of them carry loss.

    Shapes: ids: int64[n].
    """

    ids: NDArray[np.int64]
    turns: tuple[tuple[int, int], ...]
    """[start, stop) in tokens, in order: turns of the assistant, with the token that ends each."""


class ChatEncoder:
    """Encodes conversations, and pairs of plain texts, with one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer, *, seq_len: int, template: ChatTemplate | None) -> None:
        """Args:
        seq_len: texts far longer than this many tokens are refused.
        template: None if only plain texts are encoded.
        """
        self._seq_len = seq_len
        self._template = template
        self._tokenizer = tokenizer
        named = template.special_tokens if template is not None else ()
        self._names = named if tokenizer.special_tokens == "text" else ()
        self._parser = Tokenizer.from_str(tokenizer.content)
        self._plain = Tokenizer.from_str(tokenizer.content)
        self._plain.encode_special_tokens = True

    def chat(self, conversation: Conversation, *, turns: Turns) -> list[EncodedText]:
        """Encode a conversation: as one text, or one for each turn if the template shows earlier turns differently.

        Raises: ValueError if the template refuses it, it is far too long, or nested too deeply.
        """
        assert self._template is not None, "conversations need a template"
        try:
            stand_ins = _stand_ins(conversation, names=self._names)
            rendered = self._template.render(_replaced(conversation, stand_ins), turns=turns)
            names = {character: name for name, character in stand_ins.items()}
            return [self._encoded(one, names=names) for one in rendered]
        except RecursionError:
            raise ValueError("the conversation is nested too deeply") from None

    def prompt(self, conversation: Conversation, *, call: str | None = None) -> list[int]:
        """Encode a conversation with what asks for the next turn of the assistant.

        Args:
            call: a function that the turn calls: its call is begun, up to the arguments.

        Raises: ValueError as `chat`; CallFormError as `ChatTemplate.begun_call`.
        """
        assert self._template is not None, "conversations need a template"
        try:
            stand_ins = _stand_ins(conversation, names=self._names)
            replaced = _replaced(conversation, stand_ins)
            text = self._template.render_prompt(replaced)
            if call is not None:
                text += self._template.begun_call(replaced, function=call)
            self._require_text(text)
            ids, _ = self._encode(text, names={character: name for name, character in stand_ins.items()})
            return [int(token) for token in ids]
        except RecursionError:
            raise ValueError("the conversation is nested too deeply") from None

    def text(self, prompt: str, *, answer: str) -> EncodedText:
        """Encode a text and what follows it, which carries loss, with the end-of-text token.

        Raises: ValueError if it is far too long or not Unicode.
        """
        whole = prompt + answer
        self._require_text(whole)
        encoder = self._plain if self._tokenizer.special_tokens == "text" else self._parser
        encoding = encoder.encode(whole, add_special_tokens=False)
        # A token across the border belongs to the answer, as in conversations.
        is_prompt = [stop <= len(prompt) for _, stop in encoding.offsets]
        ids = np.array([*encoding.ids, self._tokenizer.eot_id], dtype=np.int64)
        start = is_prompt.index(False) if False in is_prompt else len(is_prompt)
        return EncodedText(ids=ids, turns=((start, len(ids)),))

    def _encoded(self, rendered: RenderedChat, *, names: Mapping[str, str]) -> EncodedText:
        self._require_text(rendered.text)
        ids, offsets = self._encode(rendered.text, names=names)
        turns = []
        for start, stop in rendered.spans:
            # A token across the border counts, as in transformers' assistant_masks.
            inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
            if len(inside):
                turns.append((int(inside[0]), int(inside[-1]) + 1))
        return EncodedText(ids=ids, turns=tuple(turns))

    def _require_text(self, text: str) -> None:
        """Raises: ValueError if a text is too long to be cut with reason, or not Unicode."""
        most = self._seq_len * _MAX_CHARS_PER_TOKEN
        if len(text) > most:
            raise ValueError(
                f"the conversation has {len(text):,} characters, more than {most:,}, which is far beyond "
                f"data.seq_len: {self._seq_len}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a surrogate pair is at character {error.start} of the rendered text") from None

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
