"""What a model is asked: its configuration, and prompts given as JSON; without torch, so that a wrong prompt is
refused before it is imported.

A prompt is a string or an object: `{"prompt": TEXT}` (or `text`, `source`), `{"messages": [...], "tools": [...]}`
for a chat model, `{"text": TEXT, "pair": TEXT}` for a classifier of pairs, `{"ids": [...]}` with token ids. An
object may have an `id`, which its answer repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from forge.data.conversations import is_list, message_list, tools_of

TEXT_KEYS = ("prompt", "text", "source")
_KEYS = {*TEXT_KEYS, "messages", "tools", "pair", "ids", "id"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerConfig:
    """The model and how it answers; JSON values only."""

    source: str
    """A folder as of `forge.inference.loaded.load`."""
    step: int | str | None = None
    ema: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    chat: bool = False
    """Render prompts with the chat template, as a turn of the user."""
    system: str | None = None
    """The system message before each conversation."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`; others have their defaults, but for those of drawing (`_SAMPLED`). Of a masked
    language model `top_k` alone: how many tokens are given for each mask."""


def check_record(record: Any) -> None:
    """Raises: ValueError unless a JSON value is a prompt."""
    if isinstance(record, str):
        return
    if not isinstance(record, Mapping):
        raise ValueError("a prompt must be a string or an object")
    unknown = sorted(set(record) - _KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r:.80}; the keys of a prompt are {', '.join(sorted(_KEYS))}")
    given = [key for key in (*TEXT_KEYS, "messages", "ids") if key in record]
    if len(given) != 1:
        raise ValueError(
            f"give one of {', '.join(TEXT_KEYS)}, messages or ids; it has {', '.join(given) or 'none'}"
        )
    value = record[given[0]]
    if given[0] in ("text", "source") and not isinstance(value, str):
        raise ValueError(f"{given[0]!r} must be a string")
    if given[0] == "prompt" and not isinstance(value, str) and not is_list(value):
        raise ValueError("'prompt' must be a string or a list of messages")
    if given[0] == "ids" and not (is_list(value) and value and all(type(one) is int and one >= 0 for one in value)):
        raise ValueError("'ids' must be a list of token ids")
    if not isinstance(record.get("pair", ""), str):
        raise ValueError("'pair' must be a string")
    key = messages_key(record)
    if key is not None and not message_list(record[key], key=key):
        raise ValueError(f"{key!r} has no messages")
    tools_of(record.get("tools"))


def require_known_ids(record: Any, *, vocabulary: int) -> None:
    """Raises: ValueError if a prompt of `check_record` has a token id that is not in the vocabulary.

    Args:
        vocabulary: number of ids, from 0 on.
    """
    ids = record.get("ids") if isinstance(record, Mapping) else None
    if ids and max(ids) >= vocabulary:
        raise ValueError(f"'ids' has {max(ids)}, and the model's vocabulary has {vocabulary} ids, from 0 on")


def messages_key(fields_of: Mapping[str, Any]) -> str | None:
    """The key of a prompt that has a list of messages."""
    if "messages" in fields_of:
        return "messages"
    return "prompt" if is_list(fields_of.get("prompt")) else None


def named_model(source: str | Path, *, step: int | str | None = None) -> str:
    """The name of a model for a message: `the best checkpoint of chat-1129-093012-ab12`, or that of a folder."""
    folder = Path(source)
    if not (folder / "plan.json").is_file():
        return folder.name
    which = "the newest checkpoint" if step is None else "the best checkpoint" if step == "best" else f"step {step}"
    return f"{which} of {folder.name}"
