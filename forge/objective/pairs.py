"""Preference pairs in rows of examples: which positions belong to which answer.

An example has two parts, marked 1 and 2 in the array `part`: the prompt with the chosen answer, and the prompt with
the rejected one. Here each of them is a side: side 2p is the chosen one of pair p, side 2p + 1 the rejected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.errors import RunError
from forge.objective.base import IGNORED, Arrays

REFERENCE_LOG_PROBS = "reference_log_probs"
"""The array with the log-probability of every target under the reference model; 0 elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """The sides of the pairs in some rows.

    Shapes: starts, lengths, rows: int64[s], of each side, as positions of the flattened rows; where: int64[k], the
    flat positions that have a target; sides: int64[k], the side of each.
    """

    arrays: Arrays
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]
    where: NDArray[np.int64]
    sides: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Arrays) -> PairRows:
        """Find the pairs of rows; those that only fill up a batch have none.

        Raises: RunError if the examples have no `part`, or not the parts 1 and 2.
        """
        if "part" not in rows or "segment_ids" not in rows:
            raise RunError("preference pairs need examples with the parts 1 and 2; use data.format: preference")
        shape = rows["tokens"].shape
        row_of = np.repeat(np.arange(shape[0]), shape[1])
        segment, part = rows["segment_ids"].reshape(-1), rows["part"].reshape(-1)
        starts = np.flatnonzero(_changes(row_of) | _changes(segment) | _changes(part))
        stops = np.append(starts[1:], len(segment))
        is_side = segment[starts] > 0
        starts, stops = starts[is_side], stops[is_side]
        _require_pairs(part[starts], segment=segment[starts])
        side_of = np.full(len(segment), -1, dtype=np.int64)
        for number, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            side_of[start:stop] = number
        where = np.flatnonzero((rows["targets"].reshape(-1) != IGNORED) & (side_of >= 0))
        return cls(
            arrays=rows,
            starts=starts,
            lengths=stops - starts,
            rows=row_of[starts],
            where=where,
            sides=side_of[where],
        )

    def packed(self) -> dict[str, NDArray[Any]]:
        """The rows as they are, with positions that restart at each side, so that no side sees another."""
        tokens = self.arrays["tokens"]
        position_ids = np.zeros(tokens.size, dtype=np.int64)
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            position_ids[start : start + length] = np.arange(length)
        return {"tokens": tokens, "position_ids": position_ids.reshape(tokens.shape), "where": self.where}

    def separated(self, *, with_last: bool = False) -> dict[str, NDArray[Any]]:
        """One padded sequence for each side; a single token if there is none.

        Args:
            with_last: add the token that the last position predicts, which no position holds; there is no `where`
                then.
        """
        lengths = self.lengths + with_last
        count, longest = max(1, len(self.starts)), int(lengths.max(initial=1))
        tokens = np.zeros((count, longest), dtype=np.int64)
        is_token = np.zeros((count, longest), dtype=np.int64)
        is_token[:, 0] = 1
        flat = self.arrays["tokens"].reshape(-1)
        for i, (start, length) in enumerate(zip(self.starts.tolist(), self.lengths.tolist(), strict=True)):
            tokens[i, :length] = flat[start : start + length]
            is_token[i, : length + with_last] = 1
        if with_last and len(self.starts):
            last = self.starts + self.lengths - 1
            tokens[np.arange(count), self.lengths] = self.arrays["targets"].reshape(-1)[last]
        where = self.where - self.starts[self.sides] + self.sides * longest
        rows = self.rows if len(self.rows) else np.zeros(1, dtype=np.int64)
        found = {"tokens": tokens, "attention_mask": is_token, "sequence_rows": rows}
        return found if with_last else {**found, "where": where}

    def texts(self, *, is_packed: bool) -> NDArray[np.int64]:
        """First and last flat position of each side, the last excluded, in the layout of `packed` or `separated`.

        Shapes: returns int64[s, 2].
        """
        starts = self.starts if is_packed else np.arange(len(self.starts)) * int(self.lengths.max(initial=1))
        return np.stack([starts, starts + self.lengths], axis=1)

    def targets(self) -> NDArray[np.int64]:
        """int64[k]."""
        return np.asarray(self.arrays["targets"].reshape(-1)[self.where], dtype=np.int64)

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sum the values at targets for each side. Shapes: [rows, T] → float64[s]."""
        chosen = values.reshape(-1)[self.where]
        return np.bincount(self.sides, weights=chosen, minlength=len(self.starts)).astype(np.float64)

    def num_targets(self) -> NDArray[np.int64]:
        """int64[s]."""
        return np.bincount(self.sides, minlength=len(self.starts)).astype(np.int64)


def _changes(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value differs from the one before it; the first does."""
    return np.concatenate([[True], values[1:] != values[:-1]])


def _require_pairs(parts: NDArray[Any], *, segment: NDArray[Any]) -> None:
    is_paired = len(parts) % 2 == 0 and (parts[0::2] == 1).all() and (parts[1::2] == 2).all()
    if not is_paired or (segment[0::2] != segment[1::2]).any():
        raise RunError("an example has not the parts 1 and 2, which a preference pair has, in this order")
