"""Calls of tools in a generated text: the two ways in which chat templates ask models to write them.

Hermes, Qwen and SmolLM write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; Llama 3 writes the JSON
object alone, with `parameters`. Text that is not such a call is content.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

_OPEN, CALL_END = "<tool_call>", "</tool_call>"


class ToolCallParser:
    """Separates the calls in one text from its content, piece by piece."""

    is_cut = False
    """Whether the last call lacks its end; such a one is content."""

    def __init__(self, names: frozenset[str]) -> None:
        """Args:
        names: of the functions that may be called.
        """
        self._names = names
        self._held = ""
        self._is_holding = self._has_content = False

    def feed(self, text: str) -> str:
        """Take the next piece. Returns: what is content for certain."""
        self._held += text
        if self._is_holding:
            return ""
        start = self._held.find(_OPEN)
        if start < 0 and not self._has_content and self._held.lstrip()[:1] in ("", "{"):
            return ""  # it may be a call as bare JSON
        if start >= 0:
            self._is_holding = True
        else:
            start = len(self._held) - _overlap(self._held, _OPEN)
        content, self._held = self._held[:start], self._held[start:]
        self._has_content = self._has_content or bool(content.strip())
        return content

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """End the text. Returns: the rest of the content, and the calls as OpenAI's API has them."""
        held = self._held
        if not held.lstrip().startswith((_OPEN, "{")):
            return held, []
        parts = [part.partition(CALL_END)[0] for part in held.split(_OPEN)[1:]] if _OPEN in held else [held]
        calls = [self._call(part) for part in parts]
        found = [call for call in calls if call is not None]
        return ("", found) if found and len(found) == len(calls) else (held, [])

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name = value.get("name") if isinstance(value, Mapping) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if not _is_utf8(written):
            return None  # half a surrogate pair, by an escape of JSON: the answer could not be sent
        return _called(name, arguments=written)


class BegunCallParser:
    """Takes a text that goes on where its prompt began the call of a function: the arguments."""

    def __init__(self, name: str) -> None:
        self._name, self._held = name, ""
        self.is_cut = False

    def feed(self, text: str) -> str:
        """Take the next piece. Returns: no content."""
        self._held += text
        return ""

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """End the text, and set `is_cut`. Returns: no content, and the call.

        Its arguments are the first JSON object, as it was written. A model may write none, or `max_tokens` may cut
        it; then they are the text, which clients of OpenAI's API have to expect too.
        """
        text = self._held.lstrip()
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            end = 0
        self.is_cut = not (end > 0 and text.startswith("{"))
        return "", [_called(self._name, arguments=text if self.is_cut else text[:end])]


def _called(name: str, *, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of a text that a marker may begin with."""
    longest = min(len(text), len(marker) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)
