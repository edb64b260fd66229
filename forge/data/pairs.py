"""The two texts of a record of `data.format: pair`: a source and its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unicodedata import category

from forge.config.data import PairSpec
from forge.data.sources.base import Record
from forge.data.sources.files import json_name
from forge.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceAndTarget:
    """What is read and what is to be written; neither is blank."""

    source: str
    target: str


def pair_of(record: Record, *, spec: PairSpec) -> SourceAndTarget:
    """Return the texts of a record, without the prefix.

    Raises: DataError if one is missing, is no string, is blank, or is not valid Unicode.
    """
    source, target = (
        _text(record, key=getattr(spec, side), of=f"data.pair.{side}") for side in ("source", "target")
    )
    return SourceAndTarget(source=source, target=target)


def checked_text(text: Any, *, key: str, location: str) -> str:
    """Return a field's value if it is text. Raises: DataError if it is no string, or not valid Unicode."""
    if not isinstance(text, str):
        raise DataError(f"{location}: {key!r} must be a string, it is {json_name(text)}")
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
        problem = f"half a surrogate pair at character {error.start}"
        raise DataError(f"{location}: the text is not valid Unicode: {problem}") from None
    return text


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: white space and format characters (zero-width space, BOM) alone."""
    return all(character.isspace() or category(character) == "Cf" for character in text)


def _text(record: Record, *, key: str, of: str) -> str:
    text = checked_text(field_of(record, key=key, of=of), key=key, location=record.location)
    if is_blank(text):
        raise DataError(f"{record.location}: {key!r} is empty")
    return text


def field_of(record: Record, *, key: str, of: str) -> Any:
    """The value of a field; one whose name has dots may be in a table within the record."""
    if key in record.fields:
        return record.fields[key]
    found: Any = record.fields
    for name in key.split("."):
        if not isinstance(found, Mapping) or name not in found:
            where = found if isinstance(found, Mapping) else record.fields
            keys = ", ".join(map(repr, list(where)[:20])) or "none"
            raise DataError(f"{record.location}: no key {key!r} ({of}); the keys are: {keys}")
        found = found[name]
    return found
