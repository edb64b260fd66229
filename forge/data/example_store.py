"""Prepared examples on the disk, and how a worker reads rows of them (`packing: examples` and `none`).

    <folder>/columns/<array>.bin         the arrays of all examples, one after the other; int32 or float32
             examples/offsets.bin        int64[n + 1]: example i is positions [offsets[i], offsets[i + 1])
             train/row_offsets.bin …     int64[R + 1]: row r holds examples row_examples[row_offsets[r] : …[r + 1]]
             train/row_examples.bin      int64
             train/row_weights.bin       float64[R]: number of loss terms
             train/row_targets.bin       int64[R]: number of predicted tokens
             train/row_tokens.bin        int64[R]: number of positions that are not padding
             held_out/…                  the same

A row is padded to `seq_len`. This module needs only numpy: workers import it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.data.cache_index import CacheIndex, Column, ExampleLayout, SplitSizes
from forge.data.formats.base import Example
from forge.data.rows import IGNORED, Arrays
from forge.data.store import FileEntry, HashedFile, verify_sizes, write_file
from forge.errors import DataError

_DTYPES = {"i": "<i4", "u": "<i4", "b": "<i4", "f": "<f4"}
_RESERVED = {"position_ids", "segment_ids"}
"""Arrays that `ExampleRows.read` adds."""
_INT32 = np.iinfo(np.int32)


class ExampleWriter:
    """Writes examples one after the other; lengths, weights and keys are kept in memory, 32 bytes an example.

    Raises: OSError from the file system; the caller reports it.
    """

    def __init__(self, folder: Path, *, seq_len: int, vocab_size: int) -> None:
        self._folder = folder
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self._columns: dict[str, Column] = {}
        self._files: dict[str, HashedFile] = {}
        self._lengths, self._targets = array("q"), array("q")
        self._weights, self._keys = array("d"), array("Q")
        self.num_tokens = 0
        self.foreign_target: str | None = None
        """Location and value of the first target that is no token id."""

    def add(self, example: Example, *, key: int, location: str) -> None:
        """Append one example.

        Args:
            key: decides on which side of the held-out split it falls.
            location: of its record, for error messages.

        Raises: DataError if it does not fit into a row, or its arrays or its weight are not valid.
        """
        arrays = _arrays_of(example, location=location)
        length = self._check(arrays, weight=example.weight, location=location)
        if not self._files:
            self._start(arrays)
        for name, column in self._columns.items():
            self._files[name].write(np.ascontiguousarray(arrays[name], dtype=column.dtype).tobytes())
        self._lengths.append(length)
        self.num_tokens += length
        self._targets.append(int((arrays["targets"] != IGNORED).sum()))
        if self.foreign_target is None and (largest := int(arrays["targets"].max())) >= self._vocab_size:
            self.foreign_target = f"{location}: the target {largest}"
        self._weights.append(example.weight)
        self._keys.append(key)

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(self._columns.values())

    @property
    def num_examples(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.frombuffer(self._lengths, dtype=np.int64)

    @property
    def weights(self) -> NDArray[np.float64]:
        return np.frombuffer(self._weights, dtype=np.float64)

    @property
    def num_targets(self) -> NDArray[np.int64]:
        return np.frombuffer(self._targets, dtype=np.int64)

    @property
    def keys(self) -> NDArray[np.uint64]:
        return np.frombuffer(self._keys, dtype=np.uint64)

    def close(self) -> list[FileEntry]:
        """Flush the columns and write the offsets. Returns: the entries of all files."""
        entries = [file.close() for file in self._files.values()]
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8")
        return [*entries, write_file(self._folder, name="examples/offsets.bin", content=offsets.tobytes())]

    def abort(self) -> None:
        """Close the open files, whatever their state; harmless after `close`."""
        for file in self._files.values():
            file.abort()

    def _start(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        (self._folder / "columns").mkdir(exist_ok=True)
        for name, values in arrays.items():
            self._columns[name] = Column(name=name, dtype=_DTYPES[values.dtype.kind], shape=values.shape[1:])
            self._files[name] = HashedFile(self._folder, name=f"columns/{name}.bin")

    def _check(self, arrays: Mapping[str, NDArray[Any]], *, weight: float, location: str) -> int:
        for name in ("tokens", "targets"):
            if name not in arrays:
                raise DataError(f"{location}: the format made an example without {name!r}")
            if arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iu":
                found = f"{arrays[name].dtype}{list(arrays[name].shape)}"
                raise DataError(f"{location}: array {name!r} is {found}; it must have one integer per position")
        length = len(arrays["tokens"])
        if not 1 <= length <= self._seq_len:
            raise DataError(
                f"{location}: an example of {length} positions does not fit into a row of data.seq_len = "
                f"{self._seq_len}; raise data.seq_len, or shorten or leave out such records"
            )
        if not 0 < weight < float("inf"):
            raise DataError(f"{location}: an example has the weight {weight}; it must be above 0 and finite")
        for name, values in arrays.items():
            if values.ndim == 0 or len(values) != length or values.dtype.kind not in _DTYPES:
                raise DataError(
                    f"{location}: array {name!r} is {values.dtype}{list(values.shape)}; it must have numbers for "
                    f"each of the {length} positions"
                )
            self._check_values(values, name=name, location=location)
        tokens = arrays["tokens"]
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise DataError(f"{location}: token ids must be in 0..{self._vocab_size - 1}")
        targets = arrays["targets"]
        if ((targets < 0) & (targets != IGNORED)).any():
            raise DataError(f"{location}: targets must be {IGNORED} (no target) or at least 0")
        shapes = {name: values.shape[1:] for name, values in arrays.items()}
        expected = {name: column.shape for name, column in self._columns.items()} or shapes
        if shapes != expected:
            raise DataError(f"{location}: the arrays {shapes} differ from those of the first example, {expected}")
        return length

    def _check_values(self, values: NDArray[Any], *, name: str, location: str) -> None:
        dtype = _DTYPES[values.dtype.kind]
        column = self._columns.get(name)
        if column is not None and column.dtype != dtype:
            stored = np.dtype(column.dtype)
            raise DataError(f"{location}: array {name!r} is {values.dtype}, that of the first example is {stored}")
        if not values.size:
            raise DataError(f"{location}: array {name!r} has no values: its shape is {list(values.shape)}")
        if dtype == "<i4" and not _INT32.min <= int(values.min()) <= int(values.max()) <= _INT32.max:
            raise DataError(f"{location}: array {name!r} has integers that do not fit into int32")
        if dtype == "<f4" and not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise DataError(f"{location}: array {name!r} has values that are not finite as float32")


def _arrays_of(example: Example, *, location: str) -> dict[str, NDArray[Any]]:
    arrays, weight = getattr(example, "arrays", None), getattr(example, "weight", None)
    if not isinstance(arrays, Mapping):
        raise DataError(f"{location}: not an Example with a mapping of arrays: {example!r:.100}")
    if not isinstance(weight, int | float | np.integer | np.floating):
        raise DataError(f"{location}: an example has the weight {weight!r:.100}; it must be a number")
    for name in arrays:
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            reserved = " and ".join(sorted(_RESERVED))
            raise DataError(
                f"{location}: {name!r} cannot name an array: no identifier, or reserved ({reserved}) are reserved"
            )
    try:
        return {name: np.asarray(values) for name, values in arrays.items()}
    except (ValueError, TypeError) as error:
        raise DataError(f"{location}: an example has an array that numpy cannot build: {error}") from error


def write_rows(
    folder: Path, *, name: str, rows: list[NDArray[np.int64]], examples: ExampleWriter
) -> list[FileEntry]:
    """Write the row table of one split; `rows` holds the examples of each row."""
    members = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype("<i8")
    tables: dict[str, NDArray[Any]] = {"row_offsets": starts, "row_examples": members.astype("<i8")}
    values = {
        "row_weights": examples.weights.astype("<f8"),
        "row_targets": examples.num_targets.astype("<i8"),
        "row_tokens": examples.lengths.astype("<i8"),
    }
    for table, per_example in values.items():
        tables[table] = np.add.reduceat(per_example[members], starts[:-1]) if rows else per_example[:0]
    return [
        write_file(folder, name=f"{name}/{table}.bin", content=content.tobytes())
        for table, content in tables.items()
    ]


@dataclass(slots=True, kw_only=True)
class ExampleRows:
    """Rows of prepared examples, memory-mapped.

    `read` gives the stored arrays as int64 or float32, and `position_ids`, which restart at every example, and
    `segment_ids`: the number of the example within the row from 1, 0 for padding.

    Raises: DataError if a file is missing or has another size than the index says.
    """

    folder: Path
    index: CacheIndex
    split: str
    _maps: dict[str, NDArray[Any]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        verify_sizes(self.folder, self.index.tables)

    def __getstate__(self) -> tuple[Path, CacheIndex, str]:
        return self.folder, self.index, self.split  # never the mapped files

    def __setstate__(self, state: tuple[Path, CacheIndex, str]) -> None:
        self.folder, self.index, self.split = state
        self._maps = {}

    @property
    def num_rows(self) -> int:
        sizes: SplitSizes = getattr(self._layout, self.split)
        return sizes.num_rows

    @property
    def seq_len(self) -> int:
        return self._layout.seq_len

    def weights(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(self._mapped(f"{self.split}/row_weights", dtype="<f8")[rows], dtype=np.float64)

    def num_targets(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self._mapped(f"{self.split}/row_targets", dtype="<i8")[rows], dtype=np.int64)

    def num_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self._mapped(f"{self.split}/row_tokens", dtype="<i8")[rows], dtype=np.int64)

    def read(self, rows: NDArray[np.int64]) -> Arrays:
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows run from 0 to {self.num_rows - 1}, asked for {rows.tolist()}")
        columns = self._layout.columns
        shape = len(rows), self.seq_len
        filled = {column.name: _padding(column, shape=shape) for column in columns}
        position_ids, segment_ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        offsets = self._mapped("examples/offsets", dtype="<i8")
        row_offsets = self._mapped(f"{self.split}/row_offsets", dtype="<i8")
        row_examples = self._mapped(f"{self.split}/row_examples", dtype="<i8")
        for i, row in enumerate(rows.tolist()):
            at = 0
            members = row_examples[row_offsets[row] : row_offsets[row + 1]].tolist()
            for number, example in enumerate(members, start=1):
                first, last = int(offsets[example]), int(offsets[example + 1])
                end = at + last - first
                for column in columns:
                    values = self._mapped(f"columns/{column.name}", dtype=column.dtype, shape=column.shape)
                    filled[column.name][i, at:end] = values[first:last]
                position_ids[i, at:end] = np.arange(end - at)
                segment_ids[i, at:end] = number
                at = end
        return {**filled, "position_ids": position_ids, "segment_ids": segment_ids}

    @property
    def num_examples(self) -> int:
        sizes: SplitSizes = getattr(self._layout, self.split)
        return sizes.num_examples

    @property
    def num_stored(self) -> int:
        """Examples of both splits."""
        return self._layout.train.num_examples + self._layout.held_out.num_examples

    def example_numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers, in the order of the records, of the examples at positions [0, num_examples) of the rows."""
        members = self._mapped(f"{self.split}/row_examples", dtype="<i8")
        return np.asarray(members[positions], dtype=np.int64)

    def numbers_between(self, first: int, stop: int) -> list[int]:
        """The numbers in [first, stop) of the split's examples, ascending; reads 8 bytes of every example."""
        members = self._mapped(f"{self.split}/row_examples", dtype="<i8")
        return sorted(members[(members >= first) & (members < stop)].tolist())

    def example(self, number: int) -> Arrays:
        """The arrays of one example of either split, as they are stored. Shapes: [n] or [n, d]."""
        first, last = self._mapped("examples/offsets", dtype="<i8")[number : number + 2].tolist()
        return {
            column.name: self._mapped(f"columns/{column.name}", dtype=column.dtype, shape=column.shape)[first:last]
            for column in self._layout.columns
        }

    @property
    def _layout(self) -> ExampleLayout:
        assert self.index.examples is not None
        return self.index.examples

    def _mapped(self, name: str, *, dtype: str, shape: tuple[int, ...] = ()) -> NDArray[Any]:
        mapped = self._maps.get(name)
        if mapped is None:
            path = self.folder / f"{name}.bin"
            flat = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
            mapped = self._maps[name] = flat.view(np.ndarray).reshape(-1, *shape)
        return mapped


def _padding(column: Column, *, shape: tuple[int, int]) -> NDArray[Any]:
    dtype = np.int64 if column.dtype == "<i4" else np.float32
    return np.full((*shape, *column.shape), IGNORED if column.name == "targets" else 0, dtype=dtype)
