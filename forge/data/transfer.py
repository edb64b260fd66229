"""Transfer a prepared corpus to another machine and verify it there against its index.

The receiver builds it as any cache, in a hidden folder that is renamed when complete, so a broken connection leaves
no partial corpus.
"""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from forge.data.cache import build_once, open_cache
from forge.data.cache_index import INDEX_NAME, MAX_INDEX_BYTES, CacheIndex, read_index, verify
from forge.data.store import verify_sizes
from forge.errors import DataError
from forge.foreign import open_file
from forge.fs import sync_folder

CHUNK_BYTES = 4 << 20
"""Most bytes of one request."""

Read = Callable[[str, int], bytes]
"""Read at most `CHUNK_BYTES` of a corpus file, given its name in the index and an offset; empty at its end."""


def has_corpus(folder: Path, *, digest: str) -> bool:
    """Whether this machine has the corpus, complete and verified."""
    try:
        open_cache(folder, digest=digest)
    except DataError:
        return False
    return True


def fetch_corpus(folder: Path, *, digest: str, read: Read) -> None:
    """Download a corpus in chunks with `read`, unless this machine has it already.

    Raises: DataError if another corpus arrives, or it cannot be written.
    """
    if not has_corpus(folder, digest=digest):
        build_once(folder, digest=digest, write=lambda draft: _fetch(draft, digest=digest, read=read))


def receive_corpus(folder: Path, *, digest: str, stream: IO[bytes]) -> None:
    """Store a corpus from the tar file that `send_corpus` writes, unless this machine has it already.

    Raises: DataError as `fetch_corpus`.
    """
    if not has_corpus(folder, digest=digest):
        build_once(folder, digest=digest, write=lambda draft: _receive(draft, digest=digest, stream=stream))


def send_corpus(folder: Path, *, stream: IO[bytes]) -> None:
    """Write a corpus as a tar file. Raises: DataError if it is incomplete; OSError."""
    index = read_index(folder)
    verify_sizes(folder, index.files)
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        for name in [INDEX_NAME, *(entry.name for entry in index.files)]:
            os.close(_open_file(folder, name))
            archive.add(folder / name, arcname=name, filter=_anonymous)


def read_chunk(folder: Path, *, name: str, offset: int) -> bytes:
    """Implement `Read` for a corpus on this machine. Raises: DataError if it has no file of this name."""
    known = {INDEX_NAME, *(entry.name for entry in read_index(folder).files)}
    if name not in known:
        raise DataError(f"{folder} has no file {name!r}")
    with os.fdopen(_open_file(folder, name), "rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def _open_file(folder: Path, name: str) -> int:
    """Open a file of the cache, never through a link, which would give away another file of this machine.

    Raises: DataError.
    """
    path = folder / name
    try:
        if any(above.is_symlink() for above in path.parents if above.is_relative_to(folder) and above != folder):
            raise OSError(errno.ELOOP, "its folder is a link")
        return open_file(path)
    except OSError as error:
        raise DataError(f"{path} is part of the token cache but cannot be read: {error.strerror}") from None


def _fetch(draft: Path, *, digest: str, read: Read) -> CacheIndex:
    _write(draft / INDEX_NAME, _chunks(read, INDEX_NAME, max_bytes=MAX_INDEX_BYTES))
    index = _index_of(draft, digest=digest)
    for entry in index.files:
        _write(draft / entry.name, _chunks(read, entry.name, max_bytes=entry.size_bytes))
    return _verified(draft, index)


def _receive(draft: Path, *, digest: str, stream: IO[bytes]) -> CacheIndex:
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            archive.extractall(draft, filter="data")
    except tarfile.TarError as error:
        raise DataError(f"the corpus did not arrive completely: {error}") from error
    return _verified(draft, _index_of(draft, digest=digest))


def _index_of(draft: Path, *, digest: str) -> CacheIndex:
    index = read_index(draft)
    if index.digest != digest:
        raise DataError(f"the corpus {index.digest} arrived, {digest} was expected")
    return index


def _verified(draft: Path, index: CacheIndex) -> CacheIndex:
    verify(draft, index=index)
    for folder in {draft / entry.name for entry in index.files}:
        sync_folder(folder.parent)
    return index


def _chunks(read: Read, name: str, *, max_bytes: int) -> Iterator[bytes]:
    """Raises: DataError if more arrives than the index says, so that no sender can fill the disk."""
    offset = 0
    while chunk := read(name, offset):
        offset += len(chunk)
        if offset > max_bytes:
            raise DataError(f"{name} of the corpus arrived with more than its {max_bytes} bytes")
        yield chunk


def _write(path: Path, chunks: Iterator[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Omit the owner of the files."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
