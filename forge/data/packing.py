"""Which examples share a row: first-fit decreasing within windows of a seeded order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forge.data.order import SampleOrder

WINDOW = 4096
"""Examples that are sorted and packed together; memory and time grow with it, padding falls."""


def pack_rows(lengths: NDArray[np.int64], *, seq_len: int, seed: int) -> list[NDArray[np.int64]]:
    """Assign examples to rows of at most `seq_len` positions; the same for the same lengths and seed.

    The examples are visited in a seeded order, `WINDOW` at a time; those of a window are taken longest first, and
    each goes into the first row of the window that has room.

    Shapes: lengths: int64[n], each in [1, seq_len]. Returns: the example indices of each row.

    Source: D. S. Johnson, "Near-optimal bin packing algorithms", MIT, 1973 (first-fit decreasing).
    """
    rows: list[NDArray[np.int64]] = []
    if not len(lengths):
        return rows
    order = SampleOrder(num_samples=len(lengths), seed=seed)
    for start in range(0, len(lengths), WINDOW):
        window = order.samples(np.arange(start, min(start + WINDOW, len(lengths)), dtype=np.int64))
        window = window[np.argsort(-lengths[window], kind="stable")]
        rows += [np.array(row, dtype=np.int64) for row in _first_fit(window.tolist(), lengths, seq_len=seq_len)]
    return rows


def _first_fit(window: list[int], lengths: NDArray[np.int64], *, seq_len: int) -> list[list[int]]:
    # A tree of the largest room below each node finds the first row with room in log2(n) comparisons.
    size = 1 << max(0, len(window) - 1).bit_length()
    room = [seq_len] * (2 * size)
    rows: list[list[int]] = [[] for _ in window]
    for example in window:
        length = int(lengths[example])
        node = 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        rows[node - size].append(example)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [row for row in rows if row]
