"""What a page shows, as texts by section and key, and what changed of it: a browser is sent only that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from forge.errors import harmless

State = Mapping[str, Mapping[str, Sequence[str]]]
"""Texts of each part of a page: section, key within it, texts."""
_MAX_CHARS = 4000
Changes = dict[str, dict[str, list[str] | None]]


def changed(before: State, now: State) -> Changes:
    """Return the keys of each section whose texts differ, None for those that are no more."""
    found: Changes = {}
    for section in {**before, **now}:
        old, new = before.get(section, {}), now.get(section, {})
        keys: dict[str, list[str] | None] = {key: None for key in old if key not in new}
        keys |= {key: [clipped(text) for text in texts] for key, texts in new.items() if old.get(key) != texts}
        if keys:
            found[section] = keys
    return found


def clipped(text: str) -> str:
    """Return a text of a run folder without control characters, and of a length that a page can show."""
    return harmless(text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}… [{len(text):,} characters]")


def message(body: Mapping[str, Any], *, number: int | None = None) -> str:
    """Return a message of a stream of server-sent events.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return ("" if number is None else f"id: {number}\n") + f"data: {text}\n\n"
