"""The index of a prepared corpus, `index.json`: what the cache contains, with the size and checksum of every file.

Writing gives a `CacheIndex` a checksum of its own. Reading checks the checksum and then the type of every value, so
that an index that another program wrote is refused with one message. This module needs only numpy, since workers
import it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forge.data.store import FileEntry, checksum, hash_file, verify_sizes, write_file
from forge.errors import DataError
from forge.foreign import file_name, from_record, parse_object, read_file
from forge.plan.data_view import Lengths

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
COLUMN_FILE = "columns/{}.bin"
"""Name of the file of a column."""
PARTS = "parts"
"""The folder of a mixture with a cache for each part."""
_FOLDERS = {"tokenizer", "examples", "columns", "train", "held_out"}
"""The folders in a cache; all of its files are in them, beside the index, or in a part."""
MAX_INDEX_BYTES = 64 * 2**20
_TOKEN_DTYPES = {"<u2", "<u4"}
_COLUMN_DTYPES = {"<i4", "<f4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One array of the examples; `shape` is that of one position."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamColumns:
    """Arrays computed for the windows of token streams (`packing: concatenate`), those of the training stream
    first: `columns/<array>.bin`."""

    seq_len: int
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSizes:
    """The training or the held-out side of an example store."""

    num_rows: int
    num_examples: int
    num_tokens: int
    """Positions that are not padding."""
    num_targets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleLayout:
    """The contents of an example store; see `forge.data.example_store`."""

    seq_len: int
    packing: str
    columns: tuple[Column, ...]
    train: SplitSizes
    held_out: SplitSizes
    notes: Mapping[str, int]
    """What was split or dropped while the examples were made, by reason."""
    foreign_target: str | None
    """Record, format and value of the first target that is no token id; None if all are."""
    noted_records: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`FILE:LINE` of the first records of each of the `notes` of which these are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRecords:
    """Records that were left out because they cannot be used (`data.on_bad_record: skip`)."""

    count: int = 0
    listed: tuple[str, ...] = ()
    """`FILE:LINE: what is wrong`, of the first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelIndex:
    """The labels of the examples (`format: labelled`), in the order of their numbers."""

    names: tuple[str, ...]
    """Empty for numbers."""
    train: tuple[int, ...]
    """How often each is the label of a training example, or of a word of one."""
    held_out: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartEntry:
    """One part of a mixture: a cache of its own in the folder `parts/<name>`."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIndex:
    """Contents of a cache. `unigram_perplexity` is None if nothing is held out."""

    digest: str
    dtype: str
    vocab_size: int
    eot_id: int
    num_documents: int
    num_text_bytes: int
    unigram_perplexity: float | None
    train: tuple[FileEntry, ...]
    held_out: tuple[FileEntry, ...]
    tokenizer: tuple[FileEntry, ...]
    tables: tuple[FileEntry, ...] = ()
    """Files of an example store, or of the parts of a mixture; then there are no token streams."""
    examples: ExampleLayout | None = None
    """None for token streams."""
    skipped: SkippedRecords = SkippedRecords()
    lengths: Lengths | None = None
    """Of all documents (token streams) or examples; None in caches of versions that did not record them."""
    labels: LabelIndex | None = None
    """None unless the format is `labelled`."""
    held_out_below: str | None = None
    """Held out are the documents whose key is below this one, in hex, as keys have 64 bits; None if nothing is held
    out, if it is the end of the only document, and in caches of versions that did not record it."""
    pad_id: int | None = None
    """The tokenizer's padding token; None if it names none, or the format is another."""
    stream_columns: StreamColumns | None = None
    """None unless something was computed for the windows of token streams."""
    parts: tuple[PartEntry, ...] = ()
    """Of a mixture."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return self.train + self.held_out + self.tokenizer + self.tables

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)

    @property
    def num_train_tokens(self) -> int:
        return sum(entry.size_bytes for entry in self.train) // np.dtype(self.dtype).itemsize

    @property
    def num_held_out_tokens(self) -> int:
        return sum(entry.size_bytes for entry in self.held_out) // np.dtype(self.dtype).itemsize


def write_index(folder: Path, *, index: CacheIndex) -> None:
    """Write `index.json`, with a checksum of its own; call it when all other files are on the disk."""
    body = asdict(index)
    if index.examples is None:
        del body["examples"]
    elif not index.examples.noted_records:
        del body["examples"]["noted_records"]
    for name in ("tables", "parts"):
        if not body[name]:
            del body[name]
    if not index.skipped.count:
        del body["skipped"]
    if index.lengths is None:
        del body["lengths"]
    if index.labels is None:
        del body["labels"]
    for name in ("pad_id", "held_out_below", "stream_columns"):
        if body[name] is None:
            del body[name]
    content = {"format": FORMAT_VERSION, "blake2b": checksum(_canonical(body)), **body}
    write_file(folder, name=INDEX_NAME, content=json.dumps(content, indent=1).encode())


def read_index(folder: Path) -> CacheIndex:
    """Read `index.json` and check that it is what was written.

    Raises: DataError naming the file and what is wrong with it.
    """
    path = folder / INDEX_NAME
    try:
        content = parse_object(read_file(path, max_bytes=MAX_INDEX_BYTES))
        version, found = content.pop("format"), content.pop("blake2b")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); prepare the corpus again") from None
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} is not the index of a token cache ({error!r}); delete {folder}") from None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format {version}, this forge reads {FORMAT_VERSION}; delete {folder}")
    if found != checksum(_canonical(content)):
        raise DataError(f"{path} was changed after it was written: its checksum differs; delete {folder}")
    try:
        index = from_record(CacheIndex, content)
        _check_names(index)
        _check_values(index)
    except ValueError as error:
        raise DataError(f"{path} is not the index of a token cache ({error}); delete {folder}") from None
    return index


def verify(folder: Path, *, index: CacheIndex) -> None:
    """Read every file and compare its checksum, at about 1 GB/s.

    Raises: DataError naming the file that differs.
    """
    verify_sizes(folder, index.files)
    for entry in index.files:
        path = folder / entry.name
        found = hash_file(path)
        if found != entry.blake2b:
            raise DataError(f"{path} has checksum {found}, the index says {entry.blake2b}; delete {folder}")


def _check_names(index: CacheIndex) -> None:
    """Raises: ValueError for a file outside of the cache's folder, or one that no cache contains."""
    names, parts = [entry.name for entry in index.files], {file_name(part.name) for part in index.parts}
    for name in names:
        folder, slash, file = name.rpartition("/")
        if folder.startswith(f"{PARTS}/"):
            _, part, *rest = folder.split("/")
            is_known = part in parts and (not rest or "/".join(rest) in _FOLDERS)
        else:
            is_known = (not slash or folder in _FOLDERS) and name != INDEX_NAME
        if not is_known:
            raise ValueError(f"it names {name!r:.80}, where no cache has a file")
        file_name(file)
    if len(set(names)) < len(names):
        raise ValueError("it names a file twice")
    if min((entry.size_bytes for entry in index.files), default=0) < 0:
        raise ValueError("a size is negative")


def _check_values(index: CacheIndex) -> None:
    """Raises: ValueError for a value that the readers of the cache cannot use."""
    if index.dtype not in _TOKEN_DTYPES:
        raise ValueError(f"dtype is {index.dtype!r}")
    if index.held_out_below is not None:
        int(index.held_out_below, 16)
    layout, labels = index.examples, index.labels
    if labels is not None and not len(labels.names) == len(labels.train) == len(labels.held_out):
        raise ValueError("labels has lists of different lengths")
    stream = index.stream_columns
    for column in (layout.columns if layout is not None else ()) + (stream.columns if stream is not None else ()):
        if column.dtype not in _COLUMN_DTYPES or min(column.shape, default=1) < 1:
            raise ValueError(f"column {column.name!r} has the dtype {column.dtype!r} and the shape {column.shape}")
    if stream is not None and stream.seq_len < 1:
        raise ValueError(f"stream_columns.seq_len is {stream.seq_len}")
    if layout is None:
        return
    if layout.seq_len < 1 or layout.train.num_rows < 1:
        raise ValueError(f"seq_len is {layout.seq_len}, train.num_rows is {layout.train.num_rows}")
    if not {"tokens", "targets"} <= {column.name for column in layout.columns}:
        raise ValueError("examples.columns lacks 'tokens' or 'targets'")


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
