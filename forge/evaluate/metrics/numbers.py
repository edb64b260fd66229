"""Metrics of numbers: mean squared error, coefficient of determination, Pearson's correlation.

Sums are taken of the distances from the first target: sums of squares of large numbers would lose their digits. One
answer that is missing or no finite number makes the value of all examples undefined (NaN), because there is no
number that it could be counted as.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from forge.errors import DataError
from forge.evaluate.metrics.base import Answer, Floats, ScoredExample, dense, ratio
from forge.objective.registry import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberScore:
    """`mse`, `r2` or `pearson`."""

    name: str
    origin: float
    """Near the targets."""

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {self.name: "min" if self.name == "mse" else "max"}

    @property
    def of_examples(self) -> tuple[str, ...]:
        return ("mse",) if self.name == "mse" else ()

    @property
    def signature(self) -> str:
        return self.name

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return dense(map(self._row, examples), width=7)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        count, x, y, xx, yy, xy, error = sums.T
        if self.name == "mse":
            return {"mse": ratio(error, count)}
        spread_y = yy - ratio(y * y, count)
        if self.name == "r2":
            return {"r2": 1 - ratio(error, spread_y)}
        spread_x = xx - ratio(x * x, count)
        with np.errstate(invalid="ignore"):
            return {"pearson": ratio(xy - ratio(x * y, count), np.sqrt(spread_x * spread_y))}

    def _row(self, example: ScoredExample) -> list[float]:
        found, expected = number_of(example.prediction), number_of(example.target)
        if not math.isfinite(expected):
            raise DataError(f"an example has the target {expected}, which is no number")
        x, y = found - self.origin, expected - self.origin
        return [1.0, x, y, x * x, y * y, x * y, (found - expected) ** 2]


def number_of(answer: Answer) -> float:
    """A prediction as a number; NaN if there is none."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return float(answer)
    try:
        return float(answer) if isinstance(answer, str) else math.nan
    except ValueError:
        return math.nan
