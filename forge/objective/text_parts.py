"""Take examples with several texts apart: one sequence for each text, padded to the longest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge.errors import RunError
from forge.objective.base import Arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class TextParts:
    """The texts of some rows, in order. Rows that only fill up have none, and give one text of a single position.

    Shapes: tokens: int64[n, L]; is_token: bool[n, L]; parts: int64[n], the value of the array `part`, 0 if it only
    fills up; rows: int64[n], ascending.
    """

    tokens: NDArray[np.int64]
    is_token: NDArray[np.bool_]
    parts: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Arrays) -> TextParts:
        """Find the texts. Raises: RunError if the examples have no `part`."""
        if "part" not in rows or "segment_ids" not in rows:
            raise RunError("the objective needs examples with several texts; use data.format: embedding")
        shape = rows["tokens"].shape
        tokens, part, segment = (rows[name].reshape(-1) for name in ("tokens", "part", "segment_ids"))
        row_of = np.repeat(np.arange(shape[0]), shape[1])
        starts = np.flatnonzero(_changes(row_of) | _changes(segment) | _changes(part))
        lengths = np.diff(starts, append=len(tokens))
        is_text = segment[starts] > 0
        starts, lengths = starts[is_text], lengths[is_text]
        if not len(starts):
            none, one = np.zeros(1, dtype=np.int64), np.ones((1, 1), dtype=np.bool_)
            return cls(tokens=none[None], is_token=one, parts=none, rows=none)
        is_token = np.arange(lengths.max()) < lengths[:, None]
        padded = np.zeros(is_token.shape, dtype=np.int64)
        padded[is_token] = tokens[segment > 0]
        return cls(
            tokens=padded,
            is_token=is_token,
            parts=part[starts].astype(np.int64),
            rows=row_of[starts].astype(np.int64),
        )


def _changes(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where a value differs from the one before it; the first does."""
    return np.concatenate([[True], values[1:] != values[:-1]])
