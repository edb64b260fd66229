"""What a format cut, dropped or split: how often, and in which records, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from forge.data.sources.base import Record
from forge.errors import printable

MAX_NOTED = 20
"""Records that are kept of each reason; all are counted."""
_MAX_CHARS = 300


class NotedRecords:
    """Counts reasons in one pass over a corpus, and keeps where the first records of each are."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def add(self, reason: str, record: Record, *, count: int = 1) -> None:
        """Count a reason; the record is listed once, however often it is given in a row.

        Args:
            count: how often the reason applies to the record; 0: not at all.
        """
        if not count:
            return
        self.counts[reason] += count
        places = self._places.setdefault(reason, [])
        place = printable(record.location, limit=_MAX_CHARS)
        if len(places) < MAX_NOTED and place not in places[-1:]:
            places.append(place)

    @property
    def listed(self) -> Mapping[str, tuple[str, ...]]:
        """`FILE:LINE` of the first records, by reason."""
        return {reason: tuple(places) for reason, places in self._places.items()}


def joined_places(every: Iterable[Mapping[str, tuple[str, ...]]]) -> Mapping[str, tuple[str, ...]]:
    """Join what `NotedRecords.listed` gave of several corpora, the first `MAX_NOTED` records of each reason."""
    joined: dict[str, tuple[str, ...]] = {}
    for listed in every:
        for reason, places in listed.items():
            joined[reason] = (*joined.get(reason, ()), *places)[:MAX_NOTED]
    return joined
