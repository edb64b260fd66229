"""Hooks of `json.loads` that refuse what JSON does not have, or what parsers read differently."""

from __future__ import annotations

import math
from typing import Any, NoReturn


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which `json` reads. Raises: ValueError."""
    raise ValueError(f"JSON has no {name}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Raises: ValueError for a key that occurs twice, of which parsers take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        moved = (name for (name, _), known in zip(pairs, found, strict=False) if name != known)
        twice = next(moved, pairs[len(found)][0])
        raise ValueError(f"the key {twice[:60]!r} occurs twice in one object")
    return found


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


STRICT: dict[str, Any] = {
    "parse_constant": refuse_constant,
    "parse_float": _finite_number,
    "object_pairs_hook": unique_keys,
}
"""NaN, numbers beyond floats, and keys that occur twice raise ValueError."""
