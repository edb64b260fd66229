"""Records of JSON, whatever is in the fields that are not used.

`json.loads` does the work. Where it gives up on a record for one odd value (an integer of 5,000 digits, 100,000
nested brackets), or where the record is large, the record is split into its fields without recursion, and only the
fields in use are parsed. Memory is bounded by the text of one record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from forge.errors import DataError

MAX_RECORD_CHARS = 1 << 25
"""A record is parsed whole; a longer one (32 MiB) is a file of another kind."""

MAX_FIELDS = 100_000
"""Of a record above 4 MiB; an object with more is a table of records under their keys."""

_LARGE_CHARS = 1 << 22
"""A record above 4 MiB is split first: its values could take 20 times the memory of their text."""

_STRING = r'"(?:[^"\\]++|\\.)*+"'
_BLANK = r"[ \t\r\n]*+"
_FLAT = rf'[\[{{](?:[^"\[\]{{}}]++|{_STRING})*+[\]}}]'
"""A list or object without another one in it."""

_WHOLE_STRING = re.compile(_STRING, re.DOTALL)
_STRUCTURE = re.compile(rf'(?:{_FLAT}[^"\[\]{{}}]*+)++|{_STRING}|[\[{{]++|[\]}}]++', re.DOTALL)
"""What ends or nests values; flat ones are taken many at once."""
_WINDOW = re.compile(rf'(?:[^"]{{1,4096}}+|{_STRING}){{1,256}}+', re.DOTALL)
"""Some text that ends outside of strings."""
_NEXT_ELEMENT = re.compile(rf"{_BLANK},{_BLANK}({_FLAT})(?={_BLANK}[,\]])", re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]}]++")
_FLAT_VALUE = re.compile(_FLAT, re.DOTALL)
_SPACE = re.compile(_BLANK)
_MAX_DIGITS = 4000
"""Python converts integers of up to 4,300 digits; a longer one becomes a float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnparsedJson:
    """A value that was not parsed: nested too deeply, very long, or of a field not in use (then without `text`)."""

    text: str = ""


def parse_record(text: str, *, columns: Sequence[str] | None) -> Any:
    """Parse one record.

    Args:
        columns: the fields in use; None for all. Of the others only the names are of use.

    Returns: the value; a dict if it is an object.
    Raises: ValueError if it is not JSON, or one field in use has two values.
    """
    try:
        if len(text) > _LARGE_CHARS:
            return _parse_fields(text, columns=columns)
        found = json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):  # too deep, or an integer of more digits than Python converts
        return _parse_fields(text, columns=columns)
    for column in columns or ():
        if text.count(f'"{column}"') > 1:
            return _parse_fields(text, columns=columns)
    return found


def find_end(text: str, start: int) -> int | None:
    """The end of the JSON value that begins at `start`; None if the text ends before the value does."""
    first = text[start : start + 1]
    if first == '"':
        string = _WHOLE_STRING.match(text, start)
        return string.end() if string else None
    if first not in ("{", "["):
        scalar = _SCALAR.match(text, start)
        return scalar.end() if scalar else None
    return _container_end(text, start)


def _container_end(text: str, start: int) -> int | None:
    flat = _FLAT_VALUE.match(text, start)
    if flat:
        return flat.end()
    depth, at = 0, start
    while window := _WINDOW.match(text, at):
        part, at = window[0], window.end()
        if depth > part.count("]") + part.count("}"):  # it cannot end here
            bare = _WHOLE_STRING.sub("", part)
            depth += bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}")
            continue
        for found in _STRUCTURE.finditer(text, window.start(), at):
            token = found[0]
            if token[0] in "[{":
                depth += len(token) if token[-1] in "[{" else 0
            elif token[0] in "]}":
                if depth <= len(token):
                    return found.start() + depth
                depth -= len(token)
    return None  # the end, or a string that is not complete


class ValueReader:
    """The texts of the elements of a JSON array, or of JSON values one after the other, with their numbers from 1.

    Raises: DataError if the text ends within a value or the array, or a value is too long.
    """

    def __init__(self, blocks: Iterable[str], *, location: str) -> None:
        self._blocks = iter(blocks)
        self._location = location
        self._text = ""
        self._at = 0
        self._number = 0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        is_array = self._next_char() == "["
        self._at += is_array
        while True:
            if is_array and self._number and (element := _NEXT_ELEMENT.match(self._text, self._at)):
                self._number += 1
                self._at = element.end()
                yield self._number, element[1]
                continue
            char = self._next_char()
            if not char or (is_array and char == "]"):
                break
            if is_array and self._number:
                if char != ",":
                    raise self._error(f"a comma is missing before {char!r}")
                self._at += 1
                self._next_char()
            self._number += 1
            yield self._number, self._value()
        if is_array:
            if not char:
                raise self._error("the file ends within its array; was it cut off?")
            self._at += 1
            if self._next_char():
                raise self._error("something follows the end of the array")

    def _next_char(self) -> str:
        """Skip white space. Returns: the character after it; empty at the end."""
        while True:
            self._at = _skip_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def _value(self) -> str:
        while True:
            end = find_end(self._text, self._at)
            if end is None or end == len(self._text):
                if len(self._text) - self._at > MAX_RECORD_CHARS:
                    raise self._error(f"the record is longer than {MAX_RECORD_CHARS} characters")
                if self._read_more():
                    continue
            if end is None:
                raise self._error("the file ends within a value, or the value is not JSON")
            start, self._at = self._at, end
            return self._text[start:end]

    def _read_more(self) -> bool:
        """Read at least as much as is left, so that a long value is scanned only a few times."""
        parts = [self._text[self._at :]]
        num_read = 0
        for block in self._blocks:
            parts.append(block)
            num_read += len(block)
            if num_read > len(parts[0]):
                break
        self._text, self._at = "".join(parts), 0
        return num_read > 0

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self._location}:{max(1, self._number)}: {problem}")


def _parse_fields(text: str, *, columns: Sequence[str] | None) -> Any:
    """Parse a record field by field."""
    at = _skip_space(text, 0)
    if text[at : at + 1] != "{":
        return _parse_value(text)
    fields: dict[str, Any] = {}
    texts: dict[str, str] = {}
    at = _skip_space(text, at + 1)
    while text[at : at + 1] != "}":
        if fields:
            at = _expect(text, at, ",")
        end = find_end(text, at)
        if end is None or text[at] != '"':
            raise ValueError(f"a key is expected at character {at}")
        key = json.loads(text[at:end])
        at = _expect(text, _skip_space(text, end), ":")
        end = find_end(text, at)
        if end is None:
            raise ValueError(f"the value of {key[:80]!r} at character {at} is not complete")
        if len(fields) == MAX_FIELDS and key not in fields:
            raise ValueError(
                f"the object has more than {MAX_FIELDS:,} keys; records are read from an array or one to a line"
            )
        if columns is None or key in columns:
            value = text[at:end]
            if texts.setdefault(key, value) != value:
                raise ValueError(f"the key {key[:80]!r} has two different values")
            fields[key] = _parse_value(value)
        else:
            fields.setdefault(key, UnparsedJson())
        at = _skip_space(text, end)
    if _skip_space(text, at + 1) != len(text):
        raise ValueError(f"something follows the record at character {at + 1}")
    return fields


def _parse_value(text: str) -> Any:
    if len(text) > _LARGE_CHARS and text.lstrip()[:1] in ("[", "{"):
        return UnparsedJson(text=text)
    try:
        return json.loads(text, parse_int=_parse_int)
    except RecursionError:
        return UnparsedJson(text=text)


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _expect(text: str, at: int, char: str) -> int:
    """Skip a character and the white space after it."""
    if text[at : at + 1] != char:
        raise ValueError(f"{char!r} is expected at character {at}")
    return _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
