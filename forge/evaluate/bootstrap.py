"""Scores with 95 % intervals, and p-values of differences, by the bootstrap over examples.

A resample draws as many examples as there are, with replacement. All metrics and models of a comparison are
computed of the same resamples, which depend on the seed and the number of examples alone. Sums are taken in the
order of the examples, by one thread, so equal outputs give equal numbers to the last bit.

Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), percentile intervals; Koehn, "Statistical
Significance Tests for Machine Translation Evaluation" (2004).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from forge.evaluate.metrics.base import Floats, Metric, ScoredExample
from forge.objective.registry import Direction

NUM_RESAMPLES = 1000
_BLOCK_VALUES = 1 << 22
"""Numbers that are held at once, of resamples and of their sums: 32 MiB each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricScore:
    """One value of a metric, with the bounds of its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float
    direction: Direction
    num_examples: int
    signature: str


def score_metric(
    metric: Metric, examples: Sequence[ScoredExample], *, seed: int = 1, num_resamples: int = NUM_RESAMPLES
) -> dict[str, MetricScore]:
    """Return every value of a metric, by name.

    Raises: DataError for an example that the metric cannot read.
    """
    table = metric.statistics(examples)
    values = metric.values(_total(table)) if examples else {}
    resampled = _resampled(metric, table, seed=seed, num_resamples=num_resamples) if examples else {}
    found = {}
    for name, direction in metric.directions.items():
        low, high = _interval(resampled[name]) if examples else (math.nan, math.nan)
        found[name] = MetricScore(
            value=float(values[name][0]) if examples else math.nan,
            low=low,
            high=high,
            direction=direction,
            num_examples=len(examples),
            signature=metric.signature,
        )
    return found


def score_examples(metric: Metric, examples: Sequence[ScoredExample]) -> dict[str, Floats]:
    """The values of single examples, of which a metric has some or none. Shapes: [N]."""
    if not metric.of_examples or not examples:
        return {}
    values = metric.values(metric.statistics(examples).toarray())
    return {name: values[name] for name in metric.of_examples if name in values}


def p_values(
    metric: Metric,
    first: Sequence[ScoredExample],
    second: Sequence[ScoredExample],
    *,
    seed: int = 1,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, float]:
    """Two-sided p-values of the differences between two models on the same examples.

    The differences of the resamples, shifted to have the mean 0, are what differences would be if the models were
    equally good. p is the share of them that is at least as large as the observed one, (count + 1) / (number + 1).

    Args:
        first, second: the outputs of the models, example by example.

    Raises: ValueError if their numbers differ; DataError.
    """
    if len(first) != len(second):
        raise ValueError(f"outputs of {len(first)} and {len(second)} examples cannot be paired")
    if not first:
        return dict.fromkeys(metric.directions, math.nan)
    tables = [metric.statistics(examples) for examples in (first, second)]
    observed = [metric.values(_total(table)) for table in tables]
    resampled = [_resampled(metric, table, seed=seed, num_resamples=num_resamples) for table in tables]
    return {
        name: _p_value(
            float(observed[0][name][0] - observed[1][name][0]), differences=resampled[0][name] - resampled[1][name]
        )
        for name in metric.directions
    }


def _p_value(observed: float, *, differences: Floats) -> float:
    defined = differences[np.isfinite(differences)]
    if not math.isfinite(observed) or not len(defined):
        return math.nan
    shifted = np.abs(defined - defined.mean())
    # Rounding must not decide whether equal models differ.
    count = int((shifted >= abs(observed) - 1e-12 * max(1.0, abs(observed))).sum())
    return (count + 1) / (len(defined) + 1)


def _resampled(metric: Metric, table: sparse.csr_array, *, seed: int, num_resamples: int) -> Mapping[str, Floats]:
    """The values of every resample. Shapes: [num_resamples]."""
    count, width = table.shape
    height = max(1, _BLOCK_VALUES // max(count, width))
    columns = table.T.tocsr()
    parts = [
        metric.values((columns @ counts.T).T)
        for counts in _draws(count, seed=seed, num_resamples=num_resamples, height=height)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in metric.directions}


def _draws(count: int, *, seed: int, num_resamples: int, height: int) -> Iterator[Floats]:
    """How often each resample has each example, in blocks. Shapes: [height, count]."""
    generator = np.random.default_rng(seed)
    for start in range(0, num_resamples, height):
        rows = range(min(height, num_resamples - start))
        yield np.stack([_drawn(generator, count=count) for _ in rows])


def _drawn(generator: np.random.Generator, *, count: int) -> Floats:
    drawn: NDArray[np.int64] = np.bincount(generator.integers(count, size=count), minlength=count)
    return drawn.astype(np.float64)


def _total(table: sparse.csr_array) -> Floats:
    """The sum of all rows. Shapes: [N, S] → [1, S]."""
    ones = np.ones((table.shape[0], 1))
    total: Floats = np.asarray(table.T.tocsr() @ ones).T
    return total


def _interval(values: Floats) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)
