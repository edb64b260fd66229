"""Further columns of a prepared corpus, computed from its examples: a cache of its own beside that of the corpus.

The files of the corpus are linked, not copied. The values are computed in parts, each written when it is done, so
a process that is killed and started again goes on where it was. Of token streams (`packing: concatenate`) the
examples are their windows, those of the training stream first.

    <cache>/data/.<folder>.parts/<first>-<stop>-<digest>.bin    values of the examples [first, stop), as records
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forge.data.cache import build_once, open_cache
from forge.data.cache_index import COLUMN_FILE, CacheIndex, Column, StreamColumns, read_index, write_index
from forge.data.store import FileEntry, HashedFile
from forge.errors import DataError
from forge.fs import link_or_copy, sync_folder, write_atomic
from forge.plan.inputs import CorpusInfo

_PART = re.compile(r"(\d+)-(\d+)-([0-9a-f]{32})\.bin")
_PART_BYTES = 1 << 28
"""Largest part, so that little is in memory."""

Values = NDArray[np.void]
Compute = Callable[[int], Iterable[Values]]
"""Given the first example that is missing, yields the values of one example after the other: records [n] of the
type `record_type`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherColumns:
    """Columns with a value for each position, and where the corpus with them is."""

    columns: tuple[Column, ...]
    digest: str
    """Names the corpus with the columns: that of the corpus, of what computes the values, and of its settings."""
    corpus: CorpusInfo

    @property
    def folder(self) -> Path:
        own = Path(self.corpus.folder)
        return own.with_name(f"{own.name.rpartition('-')[0] or own.name}-{self.digest[:16]}")

    @property
    def facts(self) -> CorpusInfo:
        """Those of the corpus with the columns."""
        return replace(self.corpus, folder=str(self.folder), digest=self.digest)


def find_columns(further: FurtherColumns) -> CorpusInfo | None:
    """Return the facts of a corpus whose columns were computed before; None if they were not."""
    try:
        open_cache(further.folder, digest=further.digest)
    except DataError:
        return None
    return further.facts


def add_columns(
    further: FurtherColumns,
    *,
    compute: Compute,
    part_is_due: Callable[[], bool],
    on_wait: Callable[[], None] = lambda: None,
) -> CorpusInfo:
    """Return the facts of the corpus with the columns, computed unless they are there.

    Args:
        part_is_due: asked after every example: whether the values since the last part are to be written.
        on_wait: called before waiting for another process that computes the same.

    Raises: DataError if it cannot be written, or the values do not fit.
    """
    found = find_columns(further)
    if found is not None:
        return found
    parts = further.folder.with_name(f".{further.folder.name}.parts")

    def write(draft: Path) -> CacheIndex:
        parts.mkdir(exist_ok=True)
        _compute(further, parts=parts, compute=compute, part_is_due=part_is_due)
        return _write(further, draft=draft, parts=parts)

    build_once(further.folder, digest=further.digest, write=write, on_wait=on_wait)
    shutil.rmtree(parts, ignore_errors=True)
    return further.facts


def done_parts(folder: Path) -> list[Path]:
    """The parts from the first example on without a gap; one that is damaged ends them."""
    by_first: dict[int, tuple[int, Path, str]] = {}
    for path in folder.iterdir():
        match = _PART.fullmatch(path.name)
        if match is not None:
            by_first[int(match[1])] = int(match[2]), path, match[3]
    found: list[Path] = []
    at = 0
    while at in by_first:
        stop, path, digest = by_first[at]
        if stop <= at or _digest(path.read_bytes()) != digest:
            break
        found.append(path)
        at = stop
    return found


def record_type(columns: Iterable[Column]) -> np.dtype[np.void]:
    """The type of the values of one position."""
    return np.dtype([(column.name, column.dtype, column.shape) for column in columns])


def num_windows(index: CacheIndex, *, seq_len: int) -> int:
    """Windows of the training and of the held-out stream."""
    counts = (index.num_train_tokens, index.num_held_out_tokens)
    return sum(max(0, count - 1) // seq_len for count in counts)


def num_positions(index: CacheIndex, *, seq_len: int) -> int:
    """Positions of all examples or windows that have values in a further column."""
    if index.examples is None:
        return num_windows(index, seq_len=seq_len) * seq_len
    return next(entry.size_bytes for entry in index.tables if entry.name == COLUMN_FILE.format("tokens")) // 4


def _compute(further: FurtherColumns, *, parts: Path, compute: Compute, part_is_due: Callable[[], bool]) -> None:
    index = read_index(Path(further.corpus.folder))
    layout = index.examples
    total = num_windows(index, seq_len=further.corpus.seq_len)
    if layout is not None:
        total = layout.train.num_examples + layout.held_out.num_examples
    done = done_parts(parts)
    for path in set(parts.iterdir()) - set(done):  # damaged, or after a damaged one
        path.unlink()
    first = at = _stop_of(done[-1]) if done else 0
    if at >= total:
        return
    waiting: list[Values] = []
    size = 0
    for values in compute(at):
        waiting.append(values)
        size += values.nbytes
        at += 1
        if at == total or part_is_due() or size >= _PART_BYTES:
            content = np.concatenate(waiting).astype(record_type(further.columns)).tobytes()
            write_atomic(parts / f"{first}-{at}-{_digest(content)}.bin", content)
            waiting, first, size = [], at, 0
    if at != total:
        names = ", ".join(column.name for column in further.columns)
        raise DataError(f"{names}: values of {at} examples were computed, there are {total}")


def _write(further: FurtherColumns, *, draft: Path, parts: Path) -> CacheIndex:
    """Link the files of the corpus, and write the columns and the index."""
    own, seq_len = Path(further.corpus.folder), further.corpus.seq_len
    index = read_index(own)
    for entry in index.files:
        (draft / entry.name).parent.mkdir(exist_ok=True)
        link_or_copy(own / entry.name, draft / entry.name)
    written = _write_columns(
        further.columns, draft=draft, parts=parts, length=num_positions(index, seq_len=seq_len)
    )
    index = replace(index, digest=further.digest, tables=(*index.tables, *written))
    if index.examples is not None:
        columns = (*index.examples.columns, *further.columns)
        index = replace(index, examples=replace(index.examples, columns=columns))
    else:
        index = replace(index, stream_columns=StreamColumns(seq_len=seq_len, columns=further.columns))
    for folder in {path.parent for path in draft.rglob("*")} - {draft}:
        sync_folder(folder)
    write_index(draft, index=index)
    return index


def _write_columns(columns: tuple[Column, ...], *, draft: Path, parts: Path, length: int) -> list[FileEntry]:
    """Write the file of each column from the parts, one part after the other."""
    files = {column.name: HashedFile(draft, name=COLUMN_FILE.format(column.name)) for column in columns}
    found = 0
    try:
        for path in done_parts(parts):
            records = np.fromfile(path, dtype=record_type(columns))
            found += len(records)
            for name, file in files.items():
                file.write(np.ascontiguousarray(records[name]).tobytes())
        if found != length:
            raise DataError(f"{', '.join(files)}: {found} positions were computed, the corpus has {length}")
        return [file.close() for file in files.values()]
    finally:
        for file in files.values():
            file.abort()


def _stop_of(part: Path) -> int:
    match = _PART.fullmatch(part.name)
    assert match is not None, "the names of parts were matched"
    return int(match[2])


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
