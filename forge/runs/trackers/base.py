"""The interface of an experiment tracker, such as W&B, and what is sent to it.

`forge.runs.trackers.feed` reads a run's records from its files and sends them; a tracker opens or continues its
own run and says which steps it already has.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

RunStatus = Literal["finished", "stopped", "failed"]
"""How a run ended; one that was stopped can be resumed."""
EVENT_KEY = "elastic/event"
"""What happened to the run since the step before, such as the loss of a machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRow:
    """One step as it is sent to a tracker."""

    step: int
    time: float
    """When the step was recorded, in seconds since the epoch."""
    metrics: Mapping[str, float]
    """The finite values of the step's line of `metrics.jsonl`, by its keys."""
    events: tuple[str, ...] = ()
    """Membership changes and the like since the step before, one line each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """The run that is tracked, without secrets."""

    folder: Path
    run_id: str
    config: Mapping[str, Any]
    """The job file."""
    group: str | None
    """The search that the run is a trial of."""
    report: Callable[[str], None]
    """Records why tracking is degraded."""


class StepRanges:
    """A set of steps, stored as ranges, since a run has many of them in a row."""

    def __init__(self, steps: Iterable[int] = ()) -> None:
        ranges: list[tuple[int, int]] = []
        start = stop = 0
        for step in steps:
            if step != stop:
                ranges.append((start, stop))
                start = step
            stop = step + 1
        ranges.append((start, stop))
        self._set(ranges)

    def add(self, start: int, stop: int) -> None:
        """Add the steps from `start` to before `stop`; none if it is not larger."""
        if start < stop:
            self._set([*self._ranges, (start, stop)])

    def __contains__(self, step: int) -> bool:
        position = bisect_right(self._ranges, step, key=itemgetter(0))
        return position > 0 and step < self._stops[position - 1]

    def _set(self, ranges: list[tuple[int, int]]) -> None:
        self._ranges = sorted(ranges)
        """Start and stop of each, in the order of their starts; they may overlap."""
        self._stops = list(accumulate((stop for _, stop in self._ranges), max))
        """The greatest stop of a range and those before it."""


class Tracker(Protocol):
    """Writes a run's steps to one experiment tracker; every method is called on the thread of its feed.

    A method may raise any exception: the feed then abandons the tracker, reports it, and starts it again later.
    """

    name: ClassVar[str]
    """Its name in messages."""
    max_rows: ClassVar[int]
    """Rows of one call of `send`, at most."""
    pause_s: ClassVar[float]
    """Least time between two calls of `send`."""

    def start(self) -> StepRanges:
        """Open the tracker's run, or continue the one that it has, and return the steps that it has already."""

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """Write steps that the tracker does not have, in their order."""

    def finish(self, status: RunStatus, events: Sequence[str]) -> None:
        """Write what happened after the last step and how the run ended, and close the tracker's run."""

    def abandon(self) -> None:
        """Close everything after a failure."""
