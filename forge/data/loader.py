"""The batch of step t: which rows a rank trains on, and the total weight of the step.

The only state of the data is the step. Step t (from 1) consumes positions `[(t-1)·B, t·B)` of the seeded order; a
rank takes its share of them in micro-batches. If a share is too short, its last micro-batch is padded with rows
whose targets are all ignored. Every rank computes the totals of a step from the store, without communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.data.order import Order
from forge.data.rows import IGNORED, Arrays, RowStore
from forge.plan.batch import BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The rows of one forward pass of one rank.

    Shapes: arrays: `tokens` and `targets` int64[m, T], and what else the store has per position;
    positions: int64[m], -1 for a row that only fills up.
    """

    arrays: Arrays
    positions: NDArray[np.int64]
    part: str | None = None
    """Of a mixture, the part that held-out rows are from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Sums over all rows of a step, of all ranks."""

    weight: float
    """Number of loss terms: the denominator of the step's loss."""
    num_targets: int
    """Number of predicted tokens."""
    num_tokens: int
    """Number of positions that are not padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatches:
    """The micro-batches of one rank at every step."""

    rows: RowStore
    order: Order
    plan: BatchPlan
    rank: int

    def totals(self, step: int) -> StepTotals:
        """The totals of step `step` (from 1), the same on every rank."""
        first = (step - 1) * self.plan.global_batch_size
        chosen = self.order.samples(np.arange(first, first + self.plan.global_batch_size, dtype=np.int64))
        return StepTotals(
            weight=float(self.rows.weights(chosen).sum()),
            num_targets=int(self.rows.num_targets(chosen).sum()),
            num_tokens=int(self.rows.num_tokens(chosen).sum()),
        )

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of step `step` (from 1); the same number on every rank."""
        low, high = self.plan.share(self.rank)
        first = (step - 1) * self.plan.global_batch_size
        positions = np.arange(first + low, first + high, dtype=np.int64)
        micro = self.plan.micro_batch_size
        for start in range(0, micro * self.plan.gradient_accumulation_steps, micro):
            chosen = positions[start : start + micro]
            yield _filled(self.rows, self.order.samples(chosen), positions=chosen, size=micro)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutBatches:
    """One rank's share of the held-out rows, in order; the same number of micro-batches on every rank.

    A micro-batch has rows of one part of a mixture, so that the loss of each part is known.
    """

    rows: RowStore
    rank: int
    """With sequence parallelism, that of its group; if it is not below `world_size`, the rank is spare, and all of
    its rows only fill up."""
    world_size: int
    """Or the number of groups."""
    micro_batch_size: int
    parts: Mapping[str, int] = field(default_factory=dict)
    """The number of rows of each part of a mixture, in their order."""

    @property
    def num_targets(self) -> int:
        """Number of predicted tokens of all ranks."""
        return int(self.rows.num_targets(np.arange(self.rows.num_rows)).sum())

    @property
    def num_batches(self) -> int:
        """Micro-batches of each rank."""
        return sum(-(-count // self._per_round) for count in self._counts.values())

    def __iter__(self) -> Iterator[MicroBatch]:
        first, is_spare = 0, self.rank >= self.world_size
        begin = 0 if is_spare else self.rank * self.micro_batch_size
        for part, count in self._counts.items():
            for at in range(begin, count + self._missing(count), self._per_round):
                stop = at if is_spare else min(at + self.micro_batch_size, count)
                chosen = np.arange(first + at, first + stop, dtype=np.int64)
                yield _filled(self.rows, chosen, positions=chosen, size=self.micro_batch_size, part=part)
            first += count

    def _missing(self, count: int) -> int:
        """What a number of rows lacks to whole rounds of all ranks."""
        return -count % self._per_round

    @property
    def _per_round(self) -> int:
        return self.world_size * self.micro_batch_size

    @property
    def _counts(self) -> Mapping[str | None, int]:
        counts: dict[str | None, int] = dict(self.parts.items())
        return counts or {None: self.rows.num_rows}


def _filled(
    rows: RowStore,
    chosen: NDArray[np.int64],
    *,
    positions: NDArray[np.int64],
    size: int,
    part: str | None = None,
) -> MicroBatch:
    missing = size - len(chosen)
    arrays = {name: _with_empty_rows(name, array, count=missing) for name, array in rows.read(chosen).items()}
    padded = np.concatenate([positions, np.full(missing, -1, dtype=np.int64)])
    return MicroBatch(arrays=arrays, positions=padded, part=part)


def _with_empty_rows(name: str, array: NDArray[Any], *, count: int) -> NDArray[Any]:
    """Append `count` padding rows: zeros, and IGNORED as targets."""
    if not count:
        return array
    filler = np.full((count, *array.shape[1:]), IGNORED if name == "targets" else 0, dtype=array.dtype)
    return np.concatenate([array, filler])
