"""Where prepared corpora lie: built once, believed only when whole.

Building happens in a hidden folder beside the cache's own, under a file lock, and ends with one rename. Whoever
is killed on the way leaves a hidden folder that the next one removes; whoever comes second waits and finds the
work done. A cache that does not verify is named in a warning and built again.
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

from forge.data import store
from forge.data.store import CacheIndex
from forge.errors import DataError
from forge.units import format_bytes

VERIFY_LIMIT_BYTES = 1 << 30
"""Caches up to 1 GiB are read and checked whole on each use (a second); of larger ones the sizes only."""

_log = logging.getLogger(__name__)


def open_cache(folder: Path, *, digest: str) -> CacheIndex:
    """The index of a cache, which is looked at. Raises: DataError if it is not whole, or another corpus's."""
    index = store.read_index(folder)
    if index.digest != digest:
        raise DataError(f"{folder} holds another corpus: {index.digest} instead of {digest}")
    if index.size_bytes <= VERIFY_LIMIT_BYTES:
        store.verify(folder, index=index)
    else:
        store.verify_sizes(folder, index.files)
    return index


def build_once(
    folder: Path,
    *,
    digest: str,
    write: Callable[[Path], CacheIndex],
    on_wait: Callable[[], None] = lambda: None,
) -> CacheIndex:
    """Build a cache under its lock, unless someone else did while we waited for it.

    Args:
        write: writes all files into a folder, the index last, and returns it.
        on_wait: called if another is building.

    Raises: DataError if it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, on_wait=on_wait):
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
            except BaseException:  # Ctrl-C too: nothing half-made stays behind
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            return index
    except OSError as error:
        raise _cannot_write(error, folder=folder) from error


@contextmanager
def _locked(folder: Path, *, on_wait: Callable[[], None] | None) -> Iterator[None]:
    """Hold the lock of a cache; the kernel lets go of it when its holder dies.

    Raises: BlockingIOError if another holds it and there is no `on_wait`.
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
    """Remove this cache, damaged as it is, and what dead processes left of any; we hold this one's lock."""
    temporary = _hidden(folder, suffix="tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if folder.exists():
        folder.rename(temporary)  # first out of sight, so that a kill leaves no half of it in its place
        shutil.rmtree(temporary)
    for other in folder.parent.glob(".*.tmp"):
        with suppress(BlockingIOError), _locked(other.with_name(other.name[1:-4]), on_wait=None):
            shutil.rmtree(other, ignore_errors=True)


def _hidden(folder: Path, *, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def sync_folder(folder: Path) -> None:
    """Have the names in it on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(error: OSError, *, folder: Path) -> DataError:
    cure = "choose another place with the environment variable FORGE_CACHE"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_bytes(shutil.disk_usage(folder.parent).free)
        return DataError(
            f"{folder}: the disk is full ({error.strerror}); its {free} that are free do not hold the tokens,"
            f" nothing was kept. Make room, or {cure}"
        )
    if error.errno == errno.EFBIG:
        return DataError(f"{folder}: a shard exceeds the largest file allowed here (see ulimit -f); {cure}")
    return DataError(f"{folder}: the token cache cannot be written ({error.strerror}: {error.filename}); {cure}")
