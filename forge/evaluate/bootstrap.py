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


@dataclass(frozen=True, slots=True, kw_only=True)
class ResampledScores:
    """The values of a metric of one model, and of each resample of its examples."""

    metric: Metric
    num_examples: int
    values: Mapping[str, float]
    resampled: Mapping[str, Floats]
    """Shapes: [resamples]."""

    @property
    def scores(self) -> dict[str, MetricScore]:
        """The values with their intervals, by name."""
        found = {}
        for name, direction in self.metric.directions.items():
            low, high = _interval(self.resampled[name])
            found[name] = MetricScore(
                value=self.values[name],
                low=low,
                high=high,
                direction=direction,
                num_examples=self.num_examples,
                signature=self.metric.signature,
            )
        return found


def resample(
    metric: Metric, examples: Sequence[ScoredExample], *, seed: int = 1, num_resamples: int = NUM_RESAMPLES
) -> ResampledScores:
    """Compute a metric of the outputs of a model.

    Raises: DataError for an example that the metric cannot read.
    """
    if not examples:
        undefined = {name: np.full(1, math.nan) for name in metric.directions}
        values = dict.fromkeys(metric.directions, math.nan)
        return ResampledScores(metric=metric, num_examples=0, values=values, resampled=undefined)
    table = metric.statistics(examples)
    values = _point_values(metric, table)
    resampled = _resampled(metric, table, seed=seed, num_resamples=num_resamples)
    return ResampledScores(metric=metric, num_examples=len(examples), values=values, resampled=resampled)


def point_values(metric: Metric, examples: Sequence[ScoredExample]) -> dict[str, float]:
    """The values of a metric without intervals. Raises: DataError for an example that the metric cannot read."""
    return _point_values(metric, metric.statistics(examples))


def _point_values(metric: Metric, table: sparse.csr_array) -> dict[str, float]:
    return {name: float(found[0]) for name, found in metric.values(_total(table)).items()}


def score_metric(
    metric: Metric, examples: Sequence[ScoredExample], *, seed: int = 1, num_resamples: int = NUM_RESAMPLES
) -> dict[str, MetricScore]:
    """Return every value of a metric with its interval, by name. Raises: DataError as `resample`."""
    return resample(metric, examples, seed=seed, num_resamples=num_resamples).scores


def score_examples(metric: Metric, examples: Sequence[ScoredExample]) -> dict[str, Floats]:
    """The values of single examples, of which a metric has some or none. Shapes: [N]."""
    if not metric.of_examples or not examples:
        return {}
    values = metric.values(metric.statistics(examples).toarray())
    return {name: values[name] for name in metric.of_examples if name in values}


def p_values(first: ResampledScores, second: ResampledScores) -> dict[str, float]:
    """Two-sided p-values of the differences between two models, by the name of the value.

    The differences of the resamples, shifted to have the mean 0, are what differences would be if the models were
    equally good. p is the share of them that is at least as large as the observed one, (count + 1) / (number + 1).

    Args:
        first, second: of the same examples in the same order, with the same seed.

    Raises: ValueError if the numbers of examples differ.
    """
    if first.num_examples != second.num_examples:
        raise ValueError(f"outputs of {first.num_examples} and {second.num_examples} examples cannot be paired")
    with np.errstate(invalid="ignore"):  # the difference of two infinite perplexities
        return {
            name: _p_value(
                first.values[name] - second.values[name], differences=first.resampled[name] - second.resampled[name]
            )
            for name in first.metric.directions
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
