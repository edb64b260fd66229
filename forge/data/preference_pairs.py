"""Records as preference pairs: a prompt with two answers, of which one is preferred.

`prompt`, `chosen` and `rejected` are texts, or lists of messages. Without a prompt, it is what both answers begin
with, as in trl's data sets with implicit prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from forge.data.conversations import ASSISTANT, Message, is_list, message_list, message_of, require_turns, tools_of
from forge.data.format_hint import format_hint
from forge.data.pairs import is_blank
from forge.data.sources.base import Record
from forge.data.sources.files import json_name
from forge.errors import DataError

ANSWERS = ("chosen", "rejected")
_MAX_TEXT_CHARS = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPair:
    """A pair of plain texts; each answer follows the prompt without anything between them."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPair:
    """A pair of conversations that begin with the same messages."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    """The messages after the prompt; the last one is the assistant's."""
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def pair_of(record: Record) -> TextPair | ChatPair:
    """Read a record as a pair.

    Raises: DataError naming the record, if it is none, a part of it is empty or of another type.
    """
    try:
        return _pair(record.fields)
    except ValueError as error:
        raise DataError(f"{record.location}: {error}") from None


def as_chat(pair: TextPair) -> ChatPair:
    """Return a pair of texts as conversations: the prompt is the user's turn, the answers are the assistant's."""
    return ChatPair(
        prompt=(message_of(pair.prompt, role="user"),),
        chosen=(message_of(pair.chosen, role=ASSISTANT),),
        rejected=(message_of(pair.rejected, role=ASSISTANT),),
    )


def _pair(fields: Mapping[str, Any]) -> TextPair | ChatPair:
    _require_answers(fields)
    kinds = {name: is_list(fields[name]) for name in ANSWERS}
    if kinds["chosen"] != kinds["rejected"]:
        named = {name: json_name(fields[name]) for name in ANSWERS}
        raise ValueError(
            f"'chosen' is {named['chosen']} and 'rejected' is {named['rejected']}; both must be texts, or "
            "both lists of messages"
        )
    prompt = fields.get("prompt")
    if prompt is not None and not isinstance(prompt, str) and not is_list(prompt):
        raise ValueError(f"'prompt' must be a text or a list of messages, it is {json_name(prompt)}")
    if kinds["chosen"] or is_list(prompt) or fields.get("system"):
        return _chat_pair(fields, prompt=prompt)
    return _text_pair(prompt, chosen=fields["chosen"], rejected=fields["rejected"])


def _require_answers(fields: Mapping[str, Any]) -> None:
    for name in ANSWERS:
        value = fields.get(name)
        if value is None:
            keys = [key for key in list(fields)[:20] if isinstance(key, str)]
            near = get_close_matches(name, keys, n=1)
            meant = f" (is {near[0]!r} meant?)" if near and near[0] not in ANSWERS else ""
            raise ValueError(
                f"the record has no {name!r}{meant}; a preference pair has 'prompt', 'chosen' and 'rejected' (its "
                f"keys: {', '.join(map(repr, keys)) or 'none':.500}){format_hint(keys, given='preference')}"
            )
        if not isinstance(value, str) and not is_list(value):
            raise ValueError(f"{name!r} must be a text or a list of messages, it is {json_name(value)}")
        if not value or (isinstance(value, str) and is_blank(value)):
            raise ValueError(f"{name!r} is empty")


def _text_pair(prompt: str | None, *, chosen: str, rejected: str) -> TextPair:
    for name, text in (("prompt", prompt or ""), ("chosen", chosen), ("rejected", rejected)):
        if len(text) > _MAX_TEXT_CHARS:
            raise ValueError(f"{name!r} has {len(text):,} characters")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name!r} has half a surrogate pair at character {error.start}") from None
    if prompt is None:
        length = _common_words(chosen, rejected)
        if not length:
            raise ValueError(
                "the record has no 'prompt', and 'chosen' and 'rejected' begin with different words, so they "
                "do not contain it either"
            )
        return TextPair(prompt=chosen[:length], chosen=chosen[length:], rejected=rejected[length:])
    if is_blank(prompt):
        raise ValueError("'prompt' is empty")
    return TextPair(prompt=prompt, chosen=chosen, rejected=rejected)


def _common_words(first: str, second: str) -> int:
    """Return how many characters two texts begin with in common, up to the space before the first other word."""
    most = min(len(first), len(second)) - 1
    same = next((i for i in range(most) if first[i] != second[i]), most)
    while same > 0 and not first[same].isspace():
        same -= 1
    return same


def _chat_pair(fields: Mapping[str, Any], *, prompt: Any) -> ChatPair:
    chosen, rejected = (_answer(fields[name], name=name) for name in ANSWERS)
    asked = _prompt_messages(prompt)
    repeats = [_begins_with(side, asked) for side in (chosen, rejected)]
    has_own = chosen[0]["role"] != ASSISTANT and rejected[0]["role"] != ASSISTANT
    if asked and all(repeats):
        chosen, rejected = chosen[len(asked) :], rejected[len(asked) :]
    elif asked and any(repeats):
        with_it, without = ANSWERS if repeats[0] else reversed(ANSWERS)
        raise ValueError(f"{with_it!r} begins with the messages of 'prompt', and {without!r} does not")
    elif not asked or (has_own and isinstance(prompt, str)):
        # A text beside whole conversations is not all that they begin with.
        length = _common_messages(chosen, rejected)
        asked, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if not asked:
        raise ValueError("'chosen' and 'rejected' begin with different messages, and there is no 'prompt'")
    for name, messages in zip(ANSWERS, (chosen, rejected), strict=True):
        _require_answer(messages, name=name)
    system = fields.get("system")
    head = [message_of(system, role="system")] if system else []
    return ChatPair(
        prompt=(*head, *asked), chosen=tuple(chosen), rejected=tuple(rejected), tools=tools_of(fields.get("tools"))
    )


def _answer(value: Any, *, name: str) -> list[Message]:
    try:
        return message_list(value, key=name) if is_list(value) else [message_of(value, role=ASSISTANT)]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _prompt_messages(prompt: Any) -> list[Message]:
    if prompt is None or prompt == "":
        return []
    try:
        messages = message_list(prompt, key="prompt") if is_list(prompt) else [message_of(prompt, role="user")]
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None
    if messages and not any(message["content"] for message in messages):
        raise ValueError("'prompt' is empty")
    return messages


def _begins_with(messages: Sequence[Message], head: Sequence[Message]) -> bool:
    return bool(head) and list(messages[: len(head)]) == list(head)


def _common_messages(first: Sequence[Message], second: Sequence[Message]) -> int:
    """Return how many messages two conversations begin with in common, an answer left in each."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), most)


def _require_answer(messages: Sequence[Message], *, name: str) -> None:
    if not messages:
        raise ValueError(f"{name}: nothing follows the prompt")
    try:
        require_turns(messages)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if messages[-1]["role"] != ASSISTANT:
        raise ValueError(f"{name}: the last message is the {messages[-1]['role']}'s, it must be the assistant's")
