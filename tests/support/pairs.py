"""Preference pairs in rows, as the store gives them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from forge.objective.base import IGNORED

Side = tuple[list[int], list[int]]
"""Ids of the prompt, and of an answer."""

PAIRS: list[tuple[Side, Side]] = [
    (([5, 9, 4], [30, 31, 32, 0]), ([5, 9, 4], [40, 0])),
    (([7, 8], [50, 0]), ([7, 8], [60, 61, 62, 63, 0])),
    (([11, 12, 13, 14], [70, 71, 0]), ([11, 12, 13, 14], [80, 81, 82, 0])),
]
"""Of token ids below 100; 0 ends an answer."""


def rows_of(*pairs: Sequence[Side], seq_len: int = 40, num_filler: int = 0) -> dict[str, NDArray[np.int64]]:
    """One row for all pairs, and rows that only fill up a batch."""
    shape = 1 + num_filler, seq_len
    rows = {name: np.zeros(shape, dtype=np.int64) for name in ("tokens", "part", "segment_ids", "position_ids")}
    rows["targets"] = np.full(shape, IGNORED, dtype=np.int64)
    at = 0
    for number, pair in enumerate(pairs, start=1):
        begin = at
        for part, (prompt, answer) in enumerate(pair, start=1):
            ids = prompt + answer
            stop = at + len(ids) - 1
            rows["tokens"][0, at:stop] = ids[:-1]
            rows["targets"][0, at + len(prompt) - 1 : stop] = answer
            rows["part"][0, at:stop] = part
            rows["segment_ids"][0, at:stop] = number
            at = stop
        rows["position_ids"][0, begin:at] = np.arange(at - begin)
    return rows
