"""Take the examples of packed rows apart: one sequence for each, padded to the longest.

For models whose attention cannot be kept within the examples of a row, such as encoders with bidirectional
attention. What the row has too much is not computed: the sequences are as long as the longest example.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.objective.base import IGNORED, Arrays

_STRIDE = 0x9E3779B97F4A7C15
"""Distance of the numbers of a row's examples. Source: Steele et al., "Fast splittable pseudorandom number
generators", OOPSLA 2014."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Examples, one per sequence. A batch without any, of rows that only fill up, has one of a single position.

    Shapes: arrays: `tokens`, `targets` and every other array [n, L, ...]; is_token: bool[n, L], false at padding;
    rows: int64[n], the row of each.
    """

    arrays: Arrays
    is_token: NDArray[np.bool_]
    rows: NDArray[np.int64]


def sequences_of(rows: Arrays) -> Sequences:
    """Return the sequences of rows: the examples if they have `segment_ids`, else the rows themselves."""
    names = [name for name in rows if name not in ("segment_ids", "position_ids", "row_seeds")]
    if "segment_ids" not in rows:
        count, length = rows["tokens"].shape
        whole = np.ones((count, length), dtype=np.bool_)
        return Sequences(arrays={name: rows[name] for name in names}, is_token=whole, rows=np.arange(count))
    found = _bounds(rows["segment_ids"])
    length = max((stop - start for _, start, stop in found), default=1)
    count = max(1, len(found))
    is_token = np.zeros((count, length), dtype=np.bool_)
    is_token[:, :1] = True  # a sequence without any token has no softmax
    arrays = {name: _filled(name, rows[name], shape=(count, length)) for name in names}
    for i, (row, start, stop) in enumerate(found):
        is_token[i, : stop - start] = True
        for name in names:
            arrays[name][i, : stop - start] = rows[name][row, start:stop]
    return Sequences(arrays=arrays, is_token=is_token, rows=np.array([row for row, _, _ in found] or [0]))


def sequence_seeds(row_seeds: NDArray[np.uint64], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a number for each sequence: that of its row, and others for the further examples of the row.

    Shapes: row_seeds: uint64[m]; rows: int64[n], ascending. Returns: uint64[n].
    """
    numbers = np.arange(len(rows)) - np.searchsorted(rows, rows)
    with np.errstate(over="ignore"):
        return row_seeds[rows] + numbers.astype(np.uint64) * np.uint64(_STRIDE)


def _bounds(segment_ids: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Row, start and stop of every example."""
    found = []
    for row, segments in enumerate(segment_ids):
        edges = np.flatnonzero(np.diff(segments, prepend=0, append=0))
        found += [(row, int(a), int(b)) for a, b in pairwise(edges) if segments[a]]
    return found


def _filled(name: str, array: NDArray[Any], *, shape: tuple[int, int]) -> NDArray[Any]:
    return np.full((*shape, *array.shape[2:]), IGNORED if name == "targets" else 0, dtype=array.dtype)
