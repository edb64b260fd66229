"""Records that cannot be used: all of them are named before training starts, or they are left out and counted.

Only what is wrong with one record is treated here. A file that cannot be read, or whose records cannot be told
apart, is an error in any case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from forge.config.data import BadRecordAction
from forge.data.sources.base import Record
from forge.errors import DataError, printable

MAX_LISTED = 1000
"""Bad records whose place and problem are kept; all are counted."""
_MAX_SHOWN = 5
_MAX_PROBLEM_CHARS = 500
_READ_ON = 100_000
"""Records that are still read after the first bad one, to say how many there are."""


class BadRecords:
    """Collects the bad records of one pass over a corpus.

    Args:
        action: `data.on_bad_record`.
        is_sample: whether the pass reads a part of the corpus, so that there may be more of them.
    """

    def __init__(self, *, action: BadRecordAction, is_sample: bool = False) -> None:
        self._skips = action == "skip"
        self._left, self._is_sample = _READ_ON, is_sample
        self.count = 0
        self.listed: list[str] = []
        """`FILE:LINE: what is wrong`, of the first ones."""

    def add(self, problem: str) -> None:
        """Count a bad record."""
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(printable(problem, limit=_MAX_PROBLEM_CHARS))

    def usable(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records that could be read. Raises: DataError if the pass must not go on."""
        for record in records:
            if record.problem:
                self.add(record.problem)
                continue
            if self.count and not self._skips:
                self._left -= 1
                if self._left <= 0:
                    raise self._error()
            yield record

    def close(self) -> None:
        """End the pass. Raises: DataError if there were bad records that are not to be skipped."""
        if self.count and not self._skips:
            raise self._error()

    def _error(self) -> DataError:
        if self.count == 1:
            return DataError(self.listed[0])
        shown = "\n".join(f"  {problem}" for problem in self.listed[:_MAX_SHOWN])
        more = f"\n  and {self.count - _MAX_SHOWN:,} more" if self.count > _MAX_SHOWN else ""
        at_least = "at least " if self._is_sample or self._left <= 0 else ""
        return DataError(
            f"{at_least}{self.count:,} records cannot be used; data.on_bad_record: skip leaves them out:\n"
            f"{shown}{more}"
        )
