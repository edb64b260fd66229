"""The interface of a source: a stream of records (of a corpus, files or a data set) in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record, or a piece of a text too long to be held at once; the pieces of a text follow each other."""

    name: str
    """The file and, where it holds many records, the line or row counted from 1: `books.jsonl:17`."""
    location: str
    """The same with the whole path, for error messages."""
    fields: Mapping[str, Any]
    starts: bool = True
    """Whether this is the first piece of its record."""
    ends: bool = True
    """Whether this is the last piece."""
    problem: str = ""
    """Why the record cannot be read, with its location; then it has no fields."""


class Source(Protocol):
    """A stream of records. The same content gives the same records in the same order on every machine."""

    def fingerprint(self) -> str:
        """Digest of the content, 32 hex digits; another content gives another digest."""

    def records(self) -> Iterator[Record]:
        """All records in order, those with a problem included. Memory must not grow with their number.

        Raises: DataError if no further record can be found.
        """

    def parts(self) -> Sequence[Iterable[Record]]:
        """The same records, part by part (a file, a shard), so that a sample can be spread evenly."""
