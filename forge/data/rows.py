"""The interface of training rows: fixed length, each with the weight of its loss.

A row is one sequence of a batch. Every store, packed or padded, is read through `RowStore`,
so that the loader, the loop and the objectives know no file format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forge.data.store import TokenStream

IGNORED = -100
"""Target of a position that carries no loss; torch's own convention."""

Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name, all with the same first two dimensions: rows and positions."""


class RowStore(Protocol):
    """Rows of `seq_len` positions, read by index."""

    @property
    def num_rows(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    def weights(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Number of loss terms of each row, always above 0; the denominator of a step is their sum.

        Shapes: rows: int64[n] → float64[n].
        """

    def num_targets(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of predicted tokens of each row. Shapes: rows: int64[n] → int64[n]."""

    def num_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of positions of each row that are not padding. Shapes: rows: int64[n] → int64[n]."""

    def read(self, rows: NDArray[np.int64]) -> Arrays:
        """The content of rows: at least `tokens` and `targets`, int64[n, seq_len].

        Raises: IndexError if a row is not in [0, num_rows).
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRows:
    """Windows of a token stream that do not overlap (`packing: concatenate`): every position is predicted."""

    stream: TokenStream
    seq_len: int

    @property
    def num_rows(self) -> int:
        return self.stream.num_sequences(self.seq_len)

    def weights(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.full(len(rows), self.seq_len, dtype=np.float64)

    def num_targets(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full(len(rows), self.seq_len, dtype=np.int64)

    def num_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.num_targets(rows)

    def read(self, rows: NDArray[np.int64]) -> Arrays:
        windows = self.stream.read(rows, self.seq_len)
        return {"tokens": np.ascontiguousarray(windows[:, :-1]), "targets": np.ascontiguousarray(windows[:, 1:])}
