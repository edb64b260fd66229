"""The order of a mixture: which row of which part stands at each position; computed, never stored.

Every block of positions has the same number of rows of each part, spread evenly and at random within the block.
Each part is read in its own `SampleOrder`, pass after pass. So the order is a pure function of (seed, position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from forge.config.data import DataSpec
from forge.data.order import GOLDEN, Order, SampleOrder, mix
from forge.plan.inputs import CorpusInfo
from forge.plan.mixture import block_counts


def build_order(data: DataSpec, corpus: CorpusInfo) -> Order:
    """Return the order in which a run reads its training rows. Raises: PlanError as `block_counts`."""
    if not corpus.parts:
        return SampleOrder(num_samples=corpus.num_train_sequences, seed=data.seed)
    num_samples = tuple(part.corpus.num_train_sequences for part in corpus.parts)
    counts = block_counts(data, num_sequences=num_samples)
    return MixtureOrder(num_samples=num_samples, counts=counts, seed=data.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOrder:
    """The order in which the rows of several parts are visited; rows are numbered part after part.

    Raises: ValueError if a part has no rows, or a block none of a part.
    """

    num_samples: tuple[int, ...]
    """Rows of each part."""
    counts: tuple[int, ...]
    """Positions of each part in a block."""
    seed: int
    _orders: tuple[SampleOrder, ...] = field(init=False, repr=False, compare=False)
    _starts: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _parts: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _ranks: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1 or len(self.counts) != len(self.num_samples):
            raise ValueError(f"a block needs at least one position of each part, not {self.counts}")
        seeds = [(self.seed + number * GOLDEN) % (1 << 64) for number in range(len(self.counts))]
        orders = [SampleOrder(num_samples=n, seed=seed) for n, seed in zip(self.num_samples, seeds, strict=True)]
        parts = interleaved(self.counts, seed=self.seed)
        by_part = np.argsort(parts, kind="stable")
        ranks = np.empty_like(parts)
        ranks[by_part] = np.concatenate([np.arange(count) for count in self.counts])
        for name, value in (
            ("_orders", tuple(orders)),
            ("_starts", np.cumsum([0, *self.num_samples[:-1]], dtype=np.int64)),
            ("_parts", parts),
            ("_ranks", ranks),
        ):
            object.__setattr__(self, name, value)

    def samples(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row at each position. Shapes and errors as those of `SampleOrder.samples`."""
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions start at 0, not {positions.min()}")
        blocks, offsets = np.divmod(positions, len(self._parts))
        parts = self._parts[offsets]
        ranks = blocks * np.array(self.counts, dtype=np.int64)[parts] + self._ranks[offsets]
        result = np.empty_like(positions)
        for part in np.unique(parts).tolist():
            own = parts == part
            result[own] = self._starts[part] + self._orders[part].samples(ranks[own])
        return result


def interleaved(counts: Sequence[int], *, seed: int) -> NDArray[np.int64]:
    """Return the part of each position of a block, with `counts[i]` positions of part i.

    Each part has an interval of places on [0, 1), and the positions take places in the order of the van der Corput
    sequence: the binary digits of a position, the last one first. Each digit is flipped at random by the digits of
    the position that are above it, so of the 2^k positions from a multiple of 2^k on one is in each interval of
    length 2^-k, whatever the seed, and in which order is random. A part has its share of them up to two positions.

    Source: J. G. van der Corput, "Verteilungsfunktionen", Proc. Ned. Akad. v. Wet. 38, 1935.
    """
    size = sum(counts)
    index = np.arange(size, dtype=np.uint64)
    key = mix(np.array([seed % (1 << 64)], dtype=np.uint64)) ^ np.uint64(GOLDEN)
    places = np.zeros(size, dtype=np.uint64)
    for bit in range(max(1, (size - 1).bit_length())):
        node = (index >> np.uint64(bit + 1)) + np.uint64(bit << 32)
        digit = (index >> np.uint64(bit)) & np.uint64(1)
        places = places * np.uint64(2) + (digit ^ (mix(key + node) & np.uint64(1)))
    order = np.argsort(places, kind="stable")
    parts = np.empty(size, dtype=np.int64)
    parts[order] = np.repeat(np.arange(len(counts)), counts)
    return parts
