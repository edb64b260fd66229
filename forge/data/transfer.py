"""A prepared corpus on its way to another machine: the same files, checked against the same index.

What arrives is built like any cache, one at a time, all or nothing, so that a connection that breaks leaves
nothing that could be taken for a corpus.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from forge.data import store
from forge.data.cache import build_once, open_cache, sync_folder
from forge.data.store import INDEX_NAME, CacheIndex
from forge.errors import DataError

CHUNK_BYTES = 4 << 20
"""Asked for at once."""

Read = Callable[[str, int], bytes]
"""From a file of the corpus, by its name in the index: what stands from an offset on, at most `CHUNK_BYTES`;
nothing at its end."""


def has_corpus(folder: Path, *, digest: str) -> bool:
    """Whether this corpus is here, whole."""
    try:
        open_cache(folder, digest=digest)
    except DataError:
        return False
    return True


def fetch_corpus(folder: Path, *, digest: str, read: Read) -> None:
    """Have a corpus here, from where `read` reads; one that is here already is left alone.

    Raises: DataError if what arrives is not that corpus, or cannot be written.
    """
    if not has_corpus(folder, digest=digest):
        build_once(folder, digest=digest, write=lambda draft: _fetch(draft, digest=digest, read=read))


def receive_corpus(folder: Path, *, digest: str, stream: IO[bytes]) -> None:
    """Have a corpus here, from what `send_corpus` writes; one that is here already is left alone.

    Raises: DataError as `fetch_corpus`.
    """
    if not has_corpus(folder, digest=digest):
        build_once(folder, digest=digest, write=lambda draft: _receive(draft, digest=digest, stream=stream))


def send_corpus(folder: Path, *, stream: IO[bytes]) -> None:
    """Write a corpus as a tar file. Raises: DataError if it is not whole; OSError."""
    index = store.read_index(folder)
    store.verify_sizes(folder, index.files)
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        for name in [INDEX_NAME, *(entry.name for entry in index.files)]:
            archive.add(folder / name, arcname=name, filter=_anonymous)


def read_chunk(folder: Path, *, name: str, offset: int) -> bytes:
    """What `Read` promises, of a corpus here. Raises: DataError for a name that is none of its files'."""
    known = {INDEX_NAME, *(entry.name for entry in store.read_index(folder).files)}
    if name not in known:
        raise DataError(f"{folder} has no file {name!r}")
    with (folder / name).open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def _fetch(draft: Path, *, digest: str, read: Read) -> CacheIndex:
    _write(draft / INDEX_NAME, _chunks(read, INDEX_NAME))
    index = _index_of(draft, digest=digest)
    for entry in index.files:
        _write(draft / entry.name, _chunks(read, entry.name))
    return _verified(draft, index)


def _receive(draft: Path, *, digest: str, stream: IO[bytes]) -> CacheIndex:
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            archive.extractall(draft, filter="data")
    except tarfile.TarError as error:
        raise DataError(f"the corpus did not arrive whole: {error}") from error
    return _verified(draft, _index_of(draft, digest=digest))


def _index_of(draft: Path, *, digest: str) -> CacheIndex:
    index = store.read_index(draft)
    if index.digest != digest:
        raise DataError(f"the corpus {index.digest} arrived, {digest} was expected")
    return index


def _verified(draft: Path, index: CacheIndex) -> CacheIndex:
    store.verify(draft, index=index)
    for folder in {draft / entry.name for entry in index.files}:
        sync_folder(folder.parent)
    return index


def _chunks(read: Read, name: str) -> Iterator[bytes]:
    offset = 0
    while chunk := read(name, offset):
        yield chunk
        offset += len(chunk)


def _write(path: Path, chunks: Iterator[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Whose files these are is nobody's business there."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
