"""Records as conversations: messages with roles, in the form that chat templates of transformers take.

Three kinds of records are read: a list of messages (`messages`, or `conversations` with `from` and `value`), a
prompt with its completion (each a text or a list of messages), and an instruction with its output (Alpaca).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from forge.data.format_hint import format_hint
from forge.data.pairs import is_blank
from forge.data.sources.base import Record
from forge.data.sources.files import json_name
from forge.errors import DataError
from forge.foreign import parse_json

Message = Mapping[str, Any]

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": ASSISTANT,
    "bing": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
}
"""Names in `from` of ShareGPT records, besides the roles themselves."""
MAX_MESSAGES = 1000
"""Every turn of the assistant is rendered with all messages before it."""
_MAX_ROLE_CHARS = 80
"""What is compared with the known roles; comparing takes memory for every character."""
_LISTS = ("messages", "conversations", "conversation")
_PROMPTS = {"prompt": ("completion", "response"), "instruction": ("output", "response")}
"""The field that asks, and those that may answer."""
_KINDS_HELP = (
    "give a list of messages in 'messages' ({\"role\": ..., \"content\": ...}), 'prompt' with 'completion', or "
    "'instruction' with 'output'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages in order, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """As JSON schemas."""


def conversation_of(record: Record) -> Conversation:
    """Read a record as a conversation with at least one turn of the assistant.

    Raises: DataError naming the record and the message, if it is not one, a turn of the assistant is empty, or a
        value is not text.
    """
    try:
        messages = _messages(record.fields)
        require_turns(messages)
        return Conversation(messages=tuple(messages), tools=tools_of(record.fields.get("tools")))
    except ValueError as error:
        raise DataError(f"{record.location}: {error}") from None


def _messages(fields: Mapping[str, Any]) -> list[Message]:
    system = fields.get("system")
    head = [_message({"role": "system", "content": system}, number=1)] if system else []
    for key in _LISTS:
        if isinstance(fields.get(key), str):
            raise ValueError(f"{key!r} must be a list of messages, it is a string")
        if fields.get(key) is not None:
            return head + message_list(fields[key], key=key)
    for question, answers in _PROMPTS.items():
        if question not in fields:
            continue
        for answer in answers:
            if answer in fields:
                return head + _turn(fields, question=question, answer=answer)
    keys = f"{', '.join(map(repr, list(fields)[:20])) or 'none':.500}"
    hint = format_hint(fields, given="chat")
    raise ValueError(f"the record is no conversation (its keys: {keys}); {_KINDS_HELP}{hint}")


def _turn(fields: Mapping[str, Any], *, question: str, answer: str) -> list[Message]:
    asked, answered = fields[question], fields[answer]
    extra = fields.get("input") if question == "instruction" else None
    if extra:
        if not isinstance(extra, str) or not isinstance(asked, str):
            raise ValueError(f"'input' and {question!r} must be strings")
        asked = f"{asked}\n\n{extra}"
    messages = message_list(asked, key=question) if is_list(asked) else [message_of(asked, role="user")]
    if is_list(answered):
        return messages + message_list(answered, key=answer)
    return [*messages, message_of(answered, role=ASSISTANT, number=len(messages) + 1)]


def message_list(value: Any, *, key: str) -> list[Message]:
    """Read a list of messages. Raises: ValueError naming the message."""
    if not is_list(value):
        raise ValueError(f"{key!r} must be a list of messages, it is {json_name(value)}")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"the conversation has {len(value):,} messages; at most {MAX_MESSAGES:,} are read")
    return [_message(item, number=number) for number, item in enumerate(value, start=1)]


def message_of(text: Any, *, role: str, number: int = 1) -> Message:
    """Return a text as a message. Raises: ValueError if it is none."""
    return _message({"role": role, "content": text}, number=number)


def _message(item: Any, *, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise ValueError(f"message {number} must be an object with 'role' and 'content', it is {json_name(item)}")
    # Parquet gives every message of a column all fields of any of them, null where it has none.
    message = {key: value for key, value in item.items() if value is not None}
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    role = message.pop(role_key, None)
    if not isinstance(role, str):
        raise ValueError(f"message {number} has no 'role' (its keys: {', '.join(map(repr, item)):.200})")
    known = role if role in ROLES else _SHAREGPT_ROLES.get(role)
    if known is None:
        near = get_close_matches(role[:_MAX_ROLE_CHARS], [*ROLES, *_SHAREGPT_ROLES], n=1)
        raise ValueError(
            f"message {number} has the role {role!r:.80}; it must be one of {', '.join(ROLES)}"
            + (f" (did you mean {near[0]}?)" if near else "")
        )
    content = message.pop(content_key, None)
    calls = message.get("tool_calls")
    if calls is not None and not (is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
        raise ValueError(f"message {number}: 'tool_calls' must be a list of objects")
    _require_text(content, number=number, may_lack=bool(calls))
    return {**message, "role": known, "content": _joined(content)}


def _joined(content: Any) -> Any:
    """Join the text parts of a content: a name of a special token could be cut in two by them."""
    if is_list(content):
        return "".join(part["text"] for part in content)
    return "" if content is None else content


def _require_text(content: Any, *, number: int, may_lack: bool) -> None:
    if content is None and may_lack:
        return
    if content is None:
        raise ValueError(f"message {number} has no 'content'")
    parts = content if is_list(content) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else json_name(part)
            raise ValueError(f"message {number} has a part of the kind {kind!r:.80}; only text can be trained on")
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError(f"the content of message {number} must be text, it is {json_name(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"half a surrogate pair at character {error.start}"
            raise ValueError(f"message {number} is not valid Unicode: {problem}") from None


def require_turns(messages: Sequence[Message]) -> None:
    """Raises: ValueError if the assistant writes nothing in these messages, or a turn of it is empty."""
    turns = [number for number, message in enumerate(messages, start=1) if message["role"] == ASSISTANT]
    if not turns:
        raise ValueError("the conversation has no turn of the assistant, so nothing of it can be learnt")
    for number in turns:
        message = messages[number - 1]
        if is_blank(message["content"]) and not message.get("tool_calls"):
            raise ValueError(f"message {number} is an empty turn of the assistant")


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read the tools: a list of JSON schemas, or the same as text."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError:
            raise ValueError("'tools' must be a list of JSON schemas, it is text that is not JSON") from None
    if value in (None, ""):
        return ()
    if not (is_list(value) and all(isinstance(tool, Mapping) for tool in value)):
        raise ValueError("'tools' must be a list of JSON schemas")
    return tuple(value)


def is_list(value: Any) -> bool:
    """Whether a value is a list, and not a string."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
