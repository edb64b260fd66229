"""The `data.format` that reads a record, by the names of its fields: advice in errors about other formats."""

from __future__ import annotations

from collections.abc import Iterable

_FIELDS: tuple[tuple[str, tuple[frozenset[str], ...]], ...] = (
    ("preference", (frozenset({"chosen", "rejected"}),)),
    (
        "chat",
        (
            frozenset({"messages"}),
            frozenset({"conversations"}),
            frozenset({"prompt", "completion"}),
            frozenset({"instruction", "output"}),
        ),
    ),
    ("labelled", (frozenset({"text", "label"}), frozenset({"text", "labels"}), frozenset({"tokens", "tags"}))),
    ("pair", (frozenset({"source", "target"}),)),
)
"""The first format of which a record has all fields of one of the sets."""


def format_hint(fields: Iterable[str], *, given: str) -> str:
    """Name the format that reads a record with these fields.

    Args:
        given: the format that the job has.
    Returns: the end of an error message; empty if no other format is known for them.
    """
    names = set(fields)
    for name, kinds in _FIELDS:
        if any(kind <= names for kind in kinds):
            return "" if name == given else f"; data.format: {name} reads such records"
    return ""
