"""The steps of a run as series of bounded length, read in one pass over any number of records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_POINTS = 1500
"""Of a series; longer ones are means over 2, 4, 8, ... steps."""
KEYS = ("train/loss", "eval/loss", "speed/tokens_per_s", "speed/mfu", "memory/peak_gib")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeries:
    """Means of metrics over equal numbers of steps."""

    steps: tuple[int, ...]
    """The last step of each point."""
    times: tuple[float, ...]
    """When it ended, in seconds since the epoch."""
    values: Mapping[str, tuple[float | None, ...]]
    """By the key of `metrics.jsonl`; None where no step of the point has a finite value."""
    steps_per_point: int
    num_not_finite: int
    """Steps whose loss is not a finite number."""

    def at_step(self, key: str, step: int) -> float | None:
        """Return the value of the first point that reaches a step, or of the last; None if there is none."""
        values = self.values[key]
        found = next((value for end, value in zip(self.steps, values, strict=True) if end >= step), None)
        return found if found is not None else next(reversed(values), None)


@dataclass(slots=True, kw_only=True)
class _Point:
    step: int
    time: float
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, other: _Point) -> None:
        self.step, self.time = other.step, other.time
        for key, value in other.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + other.counts[key]

    def mean(self, key: str) -> float | None:
        mean = self.sums[key] / self.counts[key] if self.counts.get(key) else math.nan
        return mean if math.isfinite(mean) else None  # sums of huge values overflow


def read_series(
    records: Iterable[Mapping[str, Any]], *, keys: tuple[str, ...] = KEYS, max_points: int = MAX_POINTS
) -> RunSeries:
    """Reduce the records of `metrics.jsonl` to at most `max_points` points."""
    builder = SeriesBuilder(keys=keys, max_points=max_points)
    for record in records:
        builder.add(record)
    return builder.series()


class SeriesBuilder:
    """Reduces the steps of a run to at most `max_points` points while they are recorded."""

    def __init__(self, *, keys: tuple[str, ...] = KEYS, max_points: int = MAX_POINTS) -> None:
        self._keys, self._max_points = keys, max_points
        self._points: list[_Point] = []
        self._width, self._num_not_finite = 1, 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one record of `metrics.jsonl`."""
        found = {key: value for key in self._keys if (value := record.get(key)) is not None}
        self._num_not_finite += record["train/loss"] is None
        one = _Point(step=record["step"], time=record["time"], sums=found, counts=dict.fromkeys(found, 1))
        _append(self._points, one, width=self._width)
        if len(self._points) > self._max_points:
            self._width *= 2
            halves, self._points = self._points, []
            for point in halves:
                _append(self._points, point, width=self._width)

    def series(self) -> RunSeries:
        """Return the points until now."""
        points = self._points
        return RunSeries(
            steps=tuple(point.step for point in points),
            times=tuple(point.time for point in points),
            values={key: tuple(point.mean(key) for point in points) for key in self._keys},
            steps_per_point=self._width,
            num_not_finite=self._num_not_finite,
        )


def _append(points: list[_Point], point: _Point, *, width: int) -> None:
    """Add a point to the last one if both are of the same `width` steps."""
    if points and (points[-1].step - 1) // width == (point.step - 1) // width:
        points[-1].add(point)
    else:
        points.append(point)
