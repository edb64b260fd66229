"""Checkpoints in a folder of a file system that all writers share.

A checkpoint is written to a staging folder, flushed and renamed. Each writer holds a shared lock on the staging
folder, so that abandoned folders can be told from those in use, and one that a fast writer has filled is kept for a
slow one. It does not use fsspec, which neither flushes nor locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from forge.checkpoint.intervals import Range
from forge.foreign import open_file, read_file
from forge.fs import free_bytes, sync_folder

MAX_SMALL_FILE_BYTES = 2**29
"""Of a manifest or state file; the largest manifests have about 60 bytes for each interval."""
_STAGING = ".staging-"
# A writer locks a staging folder within milliseconds of creating it.
_LOCK_GRACE_S = 60.0
# On a file system without locks a staging folder counts as abandoned after this.
_ABANDONED_AFTER_S = 86400.0
_CHUNK_BYTES = 8 * 2**20
_DIRECT_FROM_BYTES = 2**20
_PAGE = 4096


class FolderStorage:
    """A folder of a file system that all writers share."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root
        self._locks: dict[str, int] = {}

    def names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(path.name for path in self._root.iterdir() if not path.name.startswith("."))
        return []

    def files(self, name: str) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            files = [path for path in (self._root / name).iterdir() if path.is_file() and not path.is_symlink()]
            return {path.name: path.stat().st_size for path in files}
        return {}

    def read(self, path: str) -> bytes:
        self._require_no_link(path)
        try:
            return read_file(self._root / path, max_bytes=MAX_SMALL_FILE_BYTES)
        except ValueError as error:
            raise OSError(errno.EFBIG, str(error), path) from None

    def read_into(self, path: str, ranges: Sequence[Range]) -> None:
        with self._open(path) as file:
            for offset, view in ranges:
                file.seek(offset)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise EOFError(f"{path} ends before byte {offset + len(view)}")
                    done += count

    def crc32(self, path: str) -> int:
        crc = 0
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        with self._open(path) as file:
            while count := file.readinto(buffer):
                crc = zlib.crc32(buffer[:count], crc)
        return crc

    def free_bytes(self) -> int | None:
        return free_bytes(self._root)

    def _open(self, path: str) -> io.FileIO:
        self._require_no_link(path)
        return io.FileIO(open_file(self._root / path))

    def _require_no_link(self, path: str) -> None:
        """Raises: OSError if the folder of a checkpoint is a link, which may lead to files of no checkpoint."""
        folder = self._root / path.partition("/")[0]
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link, which may lead outside the folder", str(folder))

    def open_staging(self, name: str, *, token: str) -> str:
        staging = f"{_STAGING}{name}-{token}"
        (self._root / staging).mkdir(parents=True, exist_ok=True)
        for former in list(self._locks):
            self._unlock(former)
        # The kernel releases the lock when this process dies.
        handle = self._locks[staging] = os.open(self._root / staging, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: only age counts
            fcntl.flock(handle, fcntl.LOCK_SH)
        return staging

    def write(self, path: str, chunks: Callable[[], Iterable[memoryview | bytes]]) -> None:
        """Write and flush; large aligned chunks bypass the page cache where the file system allows it."""
        handle = os.open(self._root / path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, handle)
            direct = _open_direct(self._root / path, stack)
            offset = 0
            for chunk in chunks():
                rest = memoryview(chunk)
                while rest:
                    written = _write_direct(direct, rest, offset) or os.pwrite(handle, rest, offset)
                    rest, offset = rest[written:], offset + written
            os.fsync(handle)

    def remove_files(self, staging: str, files: Sequence[str]) -> None:
        for file in files:
            (self._root / staging / file).unlink(missing_ok=True)

    def publish(self, staging: str, name: str, *, last: tuple[str, bytes]) -> None:
        """Flush the folder, then rename it."""
        self.write(f"{staging}/{last[0]}", lambda: [last[1]])
        sync_folder(self._root / staging)
        try:
            (self._root / staging).rename(self._root / name)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, "already exists", name) from error
            raise
        sync_folder(self._root)
        self._unlock(staging)

    def discard(self, staging: str, *, token: str) -> None:
        """Remove the whole folder, which belongs to one token."""
        shutil.rmtree(self._root / staging, ignore_errors=True)
        self._unlock(staging)

    def remove(self, name: str, *, keep_token: str | None = None) -> None:
        """Rename first, so that no reader finds a partly removed checkpoint."""
        removed = self._root / f"{_STAGING}removed-{name}-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            (self._root / name).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def sweep(self, *, own: str, up_to: str) -> None:
        """Remove staging folders without a lock holder, and earlier ones of the caller."""
        for staging in self._root.glob(f"{_STAGING}*"):
            token = staging.name.rpartition("-")[2]
            if not token.startswith(own):
                _remove_abandoned(staging)
            elif token <= up_to:  # a later one may not be locked yet
                shutil.rmtree(staging, ignore_errors=True)
                self._unlock(staging.name)

    def _unlock(self, staging: str) -> None:
        handle = self._locks.pop(staging, None)
        if handle is not None:
            os.close(handle)


def _open_direct(path: Path, stack: contextlib.ExitStack) -> int | None:
    """Open the file for direct I/O; through the page cache 1 GB takes up to 2 s of CPU time."""
    try:
        direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:  # not supported, e.g. by tmpfs or FUSE
        return None
    stack.callback(os.close, direct)
    return direct


def _write_direct(direct: int | None, data: memoryview, offset: int) -> int:
    """Write the leading whole pages of `data`. Returns: bytes written; 0 if direct I/O is not possible."""
    whole = len(data) // _PAGE * _PAGE
    if direct is None or whole < _DIRECT_FROM_BYTES or offset % _PAGE:
        return 0
    try:
        return os.pwrite(direct, data[:whole], offset)
    except OSError as error:
        if error.errno == errno.EINVAL:  # memory or device with another alignment
            return 0
        raise


def _remove_abandoned(staging: Path) -> None:
    """Remove a staging folder whose writers have died: no lock is held, or nothing was written for a long time."""
    try:
        handle = os.open(staging, os.O_RDONLY)
    except OSError:
        return
    try:
        limit_s = _LOCK_GRACE_S
        try:
            # Kept while files are removed: a writer that opens the folder meanwhile then finds that it is gone.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            limit_s = _ABANDONED_AFTER_S
        with contextlib.suppress(OSError):
            age_s = time.time() - max(path.stat().st_mtime for path in (staging, *staging.iterdir()))
            if age_s > limit_s:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(handle)
