"""A further column of a prepared corpus, computed from its examples: a cache of its own beside that of the corpus.

The files of the corpus are linked, not copied. The values are computed in parts, each written when it is done, so a
process that is killed and started again goes on where it was.

    <cache>/data/.<folder>.parts/<first>-<stop>-<digest>.bin    values of the examples [first, stop), float32
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forge.data.cache import build_once, open_cache
from forge.data.cache_index import CacheIndex, Column, read_index, write_index
from forge.data.store import FileEntry, write_file
from forge.errors import DataError
from forge.fs import sync_folder, write_atomic
from forge.plan.inputs import CorpusInfo

_PART = re.compile(r"(\d+)-(\d+)-([0-9a-f]{32})\.bin")
_FILE = "columns/{}.bin"

Values = NDArray[np.float32]
Compute = Callable[[int], Iterable[Values]]
"""Given the first example that is missing, yields the values of one example after the other, float32[n] each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherColumn:
    """A column, one value for each position, and where the corpus with it is."""

    name: str
    digest: str
    """Names the corpus with the column: that of the corpus, of what computes the values, and of its settings."""
    corpus: CorpusInfo

    @property
    def folder(self) -> Path:
        own = Path(self.corpus.folder)
        return own.with_name(f"{own.name.rpartition('-')[0] or own.name}-{self.digest[:16]}")

    @property
    def facts(self) -> CorpusInfo:
        """Those of the corpus with the column."""
        return replace(self.corpus, folder=str(self.folder), digest=self.digest)


def find_column(column: FurtherColumn) -> CorpusInfo | None:
    """Return the facts of a corpus whose column was computed before; None if it was not."""
    try:
        open_cache(column.folder, digest=column.digest)
    except DataError:
        return None
    return column.facts


def add_column(
    column: FurtherColumn,
    *,
    compute: Compute,
    part_is_due: Callable[[], bool],
    on_wait: Callable[[], None] = lambda: None,
) -> CorpusInfo:
    """Return the facts of the corpus with the column, computed unless it is there.

    Args:
        part_is_due: asked after every example: whether the values since the last part are to be written.
        on_wait: called before waiting for another process that computes the same.

    Raises: DataError if it cannot be written, or the values do not fit.
    """
    found = find_column(column)
    if found is not None:
        return found
    parts = column.folder.with_name(f".{column.folder.name}.parts")

    def write(draft: Path) -> CacheIndex:
        parts.mkdir(exist_ok=True)
        _compute(column, parts=parts, compute=compute, part_is_due=part_is_due)
        return _write(column, draft=draft, parts=parts)

    build_once(column.folder, digest=column.digest, write=write, on_wait=on_wait)
    shutil.rmtree(parts, ignore_errors=True)
    return column.facts


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


def _compute(column: FurtherColumn, *, parts: Path, compute: Compute, part_is_due: Callable[[], bool]) -> None:
    index = read_index(Path(column.corpus.folder))
    assert index.examples is not None, "only examples have columns"
    total = index.examples.train.num_examples + index.examples.held_out.num_examples
    done = done_parts(parts)
    for path in set(parts.iterdir()) - set(done):  # damaged, or after a damaged one
        path.unlink()
    first = at = _stop_of(done[-1]) if done else 0
    if at >= total:
        return
    waiting: list[Values] = []
    for values in compute(at):
        waiting.append(values)
        at += 1
        if at == total or part_is_due():
            content = np.concatenate(waiting).astype("<f4").tobytes()
            write_atomic(parts / f"{first}-{at}-{_digest(content)}.bin", content)
            waiting, first = [], at
    if at != total:
        raise DataError(f"{column.name}: values of {at} examples were computed, there are {total}")


def _write(column: FurtherColumn, *, draft: Path, parts: Path) -> CacheIndex:
    """Link the files of the corpus, and write the column and the index."""
    own = Path(column.corpus.folder)
    index = read_index(own)
    assert index.examples is not None, "only examples have columns"
    for entry in index.files:
        (draft / entry.name).parent.mkdir(exist_ok=True)
        _link(own / entry.name, draft / entry.name)
    content = b"".join(path.read_bytes() for path in done_parts(parts))
    tokens = next(entry for entry in index.tables if entry.name == _FILE.format("tokens"))
    if len(content) != tokens.size_bytes:
        raise DataError(f"{column.name}: {len(content)} bytes were computed for {tokens.size_bytes} of tokens")
    written: FileEntry = write_file(draft, name=_FILE.format(column.name), content=content)
    added = Column(name=column.name, dtype="<f4", shape=())
    layout = replace(index.examples, columns=(*index.examples.columns, added))
    index = replace(index, digest=column.digest, tables=(*index.tables, written), examples=layout)
    for folder in {path.parent for path in draft.rglob("*")} - {draft}:
        sync_folder(folder)
    write_index(draft, index=index)
    return index


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _stop_of(part: Path) -> int:
    match = _PART.fullmatch(part.name)
    assert match is not None, "the names of parts were matched"
    return int(match[2])


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
