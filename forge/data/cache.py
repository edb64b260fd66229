"""The cache of prepared corpora: each corpus is built once and verified before use.

A cache is built in a hidden folder beside its final one, under a file lock, and published with one rename. A killed
build leaves a hidden folder that the next build removes; a process that finds the lock taken waits and uses the
result. A cache that does not verify is logged as a warning and built again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from forge.data.cache_index import CacheIndex, read_index, verify
from forge.data.store import verify_sizes
from forge.errors import DataError
from forge.fs import sync_folder
from forge.units import format_bytes

VERIFY_LIMIT_BYTES = 1 << 30
"""Up to this size all checksums are verified on each use (about a second); above it only the file sizes."""

_log = logging.getLogger(__name__)


def open_cache(folder: Path, *, digest: str) -> CacheIndex:
    """Verify a cache and return its index. Raises: DataError if it is damaged or belongs to another corpus."""
    index = read_index(folder)
    if index.digest != digest:
        raise DataError(f"{folder} holds another corpus: {index.digest} instead of {digest}")
    if index.size_bytes <= VERIFY_LIMIT_BYTES:
        verify(folder, index=index)
    else:
        verify_sizes(folder, index.files)
    return index


def build_once(
    folder: Path,
    *,
    digest: str,
    write: Callable[[Path], CacheIndex],
    on_wait: Callable[[], None] = lambda: None,
) -> CacheIndex:
    """Build a cache under its lock, unless another process built it while this one waited.

    Args:
        write: writes all files into a folder, the index last, and returns it.
        on_wait: called before waiting for another process that is building the cache.

    Raises: DataError if it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, on_wait=on_wait):
            if folder.exists() and not folder.is_dir():
                raise DataError(f"{folder} is a file, but the token cache is a folder; move or delete the file")
            if folder.exists():
                try:
                    return open_cache(folder, digest=digest)
                except DataError as error:
                    _log.warning("the token cache is damaged and is built again: %s", error)
            _remove_leftovers(folder)
            temporary = _hidden(folder, suffix="tmp")
            try:
                temporary.mkdir()
                index = write(temporary)
                sync_folder(temporary)
                temporary.rename(folder)
                sync_folder(folder.parent)
            except BaseException:  # on Ctrl-C too: leave no partial cache
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            return index
    except OSError as error:
        raise _cannot_write(error, folder=folder) from error


@contextmanager
def _locked(folder: Path, *, on_wait: Callable[[], None] | None) -> Iterator[None]:
    """Hold the lock of a cache; the kernel releases it when the process dies.

    Raises: BlockingIOError if another process holds it and `on_wait` is None.
    """
    handle = os.open(_hidden(folder, suffix="lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                raise
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Remove this damaged cache and the temporary folders of dead processes; the caller holds this cache's lock."""
    temporary = _hidden(folder, suffix="tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if folder.exists():
        folder.rename(temporary)  # hide it first, so that a kill leaves no partial cache under its name
        shutil.rmtree(temporary)
    for other in folder.parent.glob(".*.tmp"):
        with suppress(BlockingIOError), _locked(other.with_name(other.name[1:-4]), on_wait=None):
            shutil.rmtree(other, ignore_errors=True)


def _hidden(folder: Path, *, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _cannot_write(error: OSError, *, folder: Path) -> DataError:
    cure = "choose another folder with the environment variable FORGE_CACHE"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_bytes(shutil.disk_usage(folder.parent).free)
        return DataError(
            f"{folder}: the disk is full ({error.strerror}): {free} free are not enough for the tokens,"
            f" and the partial cache was removed. Free some space, or {cure}"
        )
    if error.errno == errno.EFBIG:
        return DataError(f"{folder}: a shard exceeds the largest file allowed here (see ulimit -f); {cure}")
    return DataError(f"{folder}: the token cache cannot be written ({error.strerror}: {error.filename}); {cure}")
