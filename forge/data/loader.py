"""The batch of step t: which sequences a rank trains on, and as what.

The only state of the data is the step. Step t (from 1) consumes positions `[(t-1)·B, t·B)` of the
seeded order; a rank takes its share of them in micro-batches, the last of which is filled up with
sequences whose every target is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge.data.order import SampleOrder
from forge.data.store import TokenStream
from forge.plan.batch import BatchPlan

IGNORED = -100
"""Target of a position that carries no loss; torch's own convention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass of one rank sees.

    Shapes: tokens, targets: int64[m, T]; positions: int64[m], -1 where a row only fills up.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatches:
    """A rank's micro-batches of every step."""

    stream: TokenStream
    order: SampleOrder
    plan: BatchPlan
    rank: int
    seq_len: int

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens of one step over all ranks."""
        return self.plan.global_batch_size * self.seq_len

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of step `step` (from 1); as many on every rank."""
        low, high = self.plan.share(self.rank)
        first = (step - 1) * self.plan.global_batch_size
        positions = np.arange(first + low, first + high, dtype=np.int64)
        micro = self.plan.micro_batch_size
        for start in range(0, micro * self.plan.gradient_accumulation_steps, micro):
            chosen = positions[start : start + micro]
            yield _filled(self.stream, self.order.samples(chosen), chosen, rows=micro, seq_len=self.seq_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutBatches:
    """A rank's part of the held-out sequences, in order; as many micro-batches on every rank."""

    stream: TokenStream
    rank: int
    world_size: int
    micro_batch_size: int
    seq_len: int

    @property
    def num_sequences(self) -> int:
        """Over all ranks."""
        return self.stream.num_sequences(self.seq_len)

    def __iter__(self) -> Iterator[MicroBatch]:
        total = self.num_sequences
        per_round = self.world_size * self.micro_batch_size
        for start in range(self.rank * self.micro_batch_size, -(-total // per_round) * per_round, per_round):
            chosen = np.arange(start, min(start + self.micro_batch_size, total), dtype=np.int64)
            yield _filled(self.stream, chosen, chosen, rows=self.micro_batch_size, seq_len=self.seq_len)


def _filled(
    stream: TokenStream, samples: NDArray[np.int64], positions: NDArray[np.int64], *, rows: int, seq_len: int
) -> MicroBatch:
    windows = np.zeros((rows, seq_len + 1), dtype=np.int64)
    if len(samples):
        windows[: len(samples)] = stream.read(samples, seq_len)
    targets = np.ascontiguousarray(windows[:, 1:])
    targets[len(samples) :] = IGNORED
    padded = np.full(rows, -1, dtype=np.int64)
    padded[: len(positions)] = positions
    return MicroBatch(tokens=np.ascontiguousarray(windows[:, :-1]), targets=targets, positions=padded)
