"""The interface of training rows: fixed length, each with the weight of its loss.

A row is one sequence of a batch. Every store, packed or padded, is read through `RowStore`,
so that the loader, the loop and the objectives know no file format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forge.data.cache_index import COLUMN_FILE, Column, StreamColumns
from forge.data.store import TokenStream
from forge.errors import DataError

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


@dataclass(slots=True, kw_only=True)
class WindowColumns:
    """Arrays computed for the windows of a token stream, memory-mapped; see `StreamColumns`.

    Raises: DataError if a file has another size than its windows need.
    """

    folder: Path
    layout: StreamColumns
    first: int
    """Windows in the files before those of this stream."""
    num_windows: int
    """In the files."""
    _maps: dict[str, NDArray[Any]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for column in self.layout.columns:
            dtype, path = np.dtype(column.dtype), self._path(column)
            wanted = self.num_windows * self.layout.seq_len * dtype.itemsize * math.prod(column.shape)
            if not path.is_file() or path.stat().st_size != wanted:
                raise DataError(f"{path} must have {wanted} bytes: those of {self.num_windows} windows; delete it")

    def __getstate__(self) -> tuple[Any, ...]:
        return self.folder, self.layout, self.first, self.num_windows  # never the mapped files

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.folder, self.layout, self.first, self.num_windows = state
        self._maps = {}

    def read(self, rows: NDArray[np.int64]) -> Arrays:
        """Shapes: rows: int64[n] → [n, seq_len, ...], integers as int64."""
        types = {column.name: np.int64 if column.dtype == "<i4" else np.float32 for column in self.layout.columns}
        return {
            column.name: self._mapped(column)[rows + self.first].astype(types[column.name])
            for column in self.layout.columns
        }

    def _mapped(self, column: Column) -> NDArray[Any]:
        mapped = self._maps.get(column.name)
        if mapped is None:
            flat: NDArray[Any] = np.memmap(self._path(column), dtype=column.dtype, mode="r").view(np.ndarray)
            mapped = self._maps[column.name] = flat.reshape(-1, self.layout.seq_len, *column.shape)
        return mapped

    def _path(self, column: Column) -> Path:
        return self.folder / COLUMN_FILE.format(column.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRows:
    """Windows of a token stream that do not overlap (`packing: concatenate`): every position is predicted."""

    stream: TokenStream
    seq_len: int
    further: WindowColumns | None = None
    """What was computed for the windows."""

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
        found: Arrays = {
            "tokens": np.ascontiguousarray(windows[:, :-1]),
            "targets": np.ascontiguousarray(windows[:, 1:]),
        }
        return found if self.further is None else {**found, **self.further.read(rows)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRows:
    """The rows of several stores, one store after the other; all have the same arrays."""

    parts: tuple[RowStore, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def seq_len(self) -> int:
        return self.parts[0].seq_len

    def weights(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        result = np.empty(len(rows), dtype=np.float64)
        for part, where, own in self._split(rows):
            result[where] = part.weights(own)
        return result

    def num_targets(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        result = np.empty(len(rows), dtype=np.int64)
        for part, where, own in self._split(rows):
            result[where] = part.num_targets(own)
        return result

    def num_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        result = np.empty(len(rows), dtype=np.int64)
        for part, where, own in self._split(rows):
            result[where] = part.num_tokens(own)
        return result

    def read(self, rows: NDArray[np.int64]) -> Arrays:
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows run from 0 to {self.num_rows - 1}, asked for {rows.tolist()}")
        result = {
            name: np.empty((len(rows), *values.shape[1:]), dtype=values.dtype)
            for name, values in self.parts[0].read(rows[:0]).items()
        }
        for part, where, own in self._split(rows):
            for name, values in part.read(own).items():
                result[name][where] = values
        return result

    def _split(self, rows: NDArray[np.int64]) -> Iterator[tuple[RowStore, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each part that rows are asked of, where they are among `rows`, and their numbers in the part."""
        stops = np.cumsum([part.num_rows for part in self.parts])
        numbers = np.searchsorted(stops, rows, side="right")
        for number in np.unique(numbers).tolist():
            part, where = self.parts[number], np.flatnonzero(numbers == number)
            yield part, where, rows[where] - (stops[number] - part.num_rows)
