"""The distribution of the lengths of documents or examples, from exact counts of each length."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from forge.plan.data_view import Lengths


def lengths_of(counts: Mapping[int, int]) -> Lengths | None:
    """Summarise how often each length occurs; None if nothing was counted.

    A percentile is the smallest length that at least this share does not exceed. The counts need little memory:
    n tokens have at most √(2n) different lengths.
    """
    if not counts:
        return None
    values = np.array(sorted(counts), dtype=np.int64)
    occurrences = np.array([counts[int(value)] for value in values], dtype=np.int64)
    up_to = np.cumsum(occurrences)
    total = int(up_to[-1])
    median, p90, p99 = (_percentile(values, up_to, share=share) for share in (0.5, 0.9, 0.99))
    return Lengths(
        count=total,
        mean=float((values * occurrences).sum() / total),
        shortest=int(values[0]),
        median=median,
        p90=p90,
        p99=p99,
        longest=int(values[-1]),
    )


def counts_of(lengths: NDArray[np.int64]) -> dict[int, int]:
    """Count how often each length occurs. Shapes: lengths: int64[n], at least 0."""
    counts = np.bincount(lengths) if len(lengths) else np.empty(0, dtype=np.int64)
    found = np.flatnonzero(counts)
    return dict(zip(found.tolist(), counts[found].tolist(), strict=True))


def _percentile(values: NDArray[np.int64], up_to: NDArray[np.int64], *, share: float) -> int:
    wanted = int(np.ceil(share * int(up_to[-1])))
    return int(values[np.searchsorted(up_to, wanted)])
