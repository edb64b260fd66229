"""Checkpoints in a folder of a file system that all writers share.

A checkpoint is written under a temporary name, flushed and renamed. Its writer holds a lock on the
temporary folder, so that what the dead leave can be told from what the living write. It does not pass
through fsspec, which neither flushes nor locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from forge.checkpoint.intervals import Range

_DRAFT = ".draft-"
# Between making a draft's folder and locking it a writer needs milliseconds.
_LOCKED_AFTER_S = 60.0
# On a file system without locks a draft is given up after this.
_ABANDONED_AFTER_S = 86400.0
_CHUNK_BYTES = 8 * 2**20
_DIRECT_FROM_BYTES = 2**20
_PAGE = 4096


class FolderStorage:
    """A folder of a file system that all writers share."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root
        self._held: dict[str, int] = {}

    def names(self) -> list[str]:
        """What lies there, drafts left out."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(path.name for path in self._root.iterdir() if not path.name.startswith("."))
        return []

    def files(self, name: str) -> dict[str, int]:
        """Files and their bytes."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return {path.name: path.stat().st_size for path in (self._root / name).iterdir() if path.is_file()}
        return {}

    def read(self, path: str) -> bytes:
        """A whole small file."""
        return (self._root / path).read_bytes()

    def read_into(self, path: str, ranges: Sequence[Range]) -> None:
        """Read straight into the views."""
        with (self._root / path).open("rb", buffering=0) as file:
            for offset, view in ranges:
                file.seek(offset)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise EOFError(f"{path} ends before byte {offset + len(view)}")
                    done += count

    def crc32(self, path: str) -> int:
        """Of a whole file."""
        found = 0
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        with (self._root / path).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                found = zlib.crc32(buffer[:count], found)
        return found

    def open_draft(self, name: str, *, token: str) -> str:
        """A folder with a name that says it is not finished."""
        draft = f"{_DRAFT}{name}-{token}"
        (self._root / draft).mkdir(parents=True, exist_ok=True)
        return draft

    def hold(self, draft: str) -> None:
        """Lock the folder; the system lets go of it when this process dies."""
        handle = os.open(self._root / draft, os.O_RDONLY)
        self._held[draft] = handle
        with contextlib.suppress(OSError):  # a file system without locks: drafts are judged by their age
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, path: str, chunks: Callable[[], Iterable[memoryview | bytes]]) -> None:
        """Write and flush; large chunks past the page cache, where they and the file system allow it."""
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

    def drop(self, draft: str, files: Sequence[str]) -> None:
        """Take away files of a draft."""
        for file in files:
            (self._root / draft / file).unlink(missing_ok=True)

    def publish(self, draft: str, name: str, *, last: tuple[str, bytes]) -> None:
        """Flush the folder, then rename it."""
        self.write(f"{draft}/{last[0]}", lambda: [last[1]])
        _flush(self._root / draft)
        try:
            (self._root / draft).rename(self._root / name)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, "is there already", name) from error
            raise
        _flush(self._root)
        self._let_go(draft)

    def discard(self, draft: str, *, token: str) -> None:
        """The whole folder: it is this token's alone."""
        shutil.rmtree(self._root / draft, ignore_errors=True)
        self._let_go(draft)

    def remove(self, name: str, *, sparing: str | None = None) -> None:
        """Rename first, so that nobody reads a checkpoint of which half is gone."""
        going = self._root / f"{_DRAFT}gone-{name}-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            (self._root / name).rename(going)
        shutil.rmtree(going, ignore_errors=True)

    def sweep(self, *, own: str, up_to: str) -> None:
        """Drafts that nobody holds a lock on, and the caller's own of before."""
        for draft in self._root.glob(f"{_DRAFT}*"):
            token = draft.name.rpartition("-")[2]
            is_own = token.startswith(own)  # what follows `up_to` may wait for its lock while we seal
            is_dead = token <= up_to if is_own else _is_abandoned(draft)
            if is_dead:
                shutil.rmtree(draft, ignore_errors=True)
                self._let_go(draft.name)

    def _let_go(self, draft: str) -> None:
        handle = self._held.pop(draft, None)
        if handle is not None:
            os.close(handle)


def _open_direct(path: Path, stack: contextlib.ExitStack) -> int | None:
    """The file once more, without the page cache, through which a GB costs up to two seconds of a processor."""
    try:
        direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:  # a file system in memory, or one of somebody's own making
        return None
    stack.callback(os.close, direct)
    return direct


def _write_direct(direct: int | None, data: memoryview, offset: int) -> int:
    """Write the whole pages at the beginning of `data`. Returns: bytes written; 0 if that is not possible here."""
    whole = len(data) // _PAGE * _PAGE
    if direct is None or whole < _DIRECT_FROM_BYTES or offset % _PAGE:
        return 0
    try:
        return os.pwrite(direct, data[:whole], offset)
    except OSError as error:
        if error.errno == errno.EINVAL:  # memory, or a device, with other pages than ours
            return 0
        raise


def _is_abandoned(draft: Path) -> bool:
    """Whether the writer of a local draft has died: its lock is free, or nothing was written for long."""
    try:
        age_s = time.time() - max(path.stat().st_mtime for path in (draft, *draft.iterdir()))
        handle = os.open(draft, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return age_s > _LOCKED_AFTER_S
    except BlockingIOError:
        return False
    except OSError:
        return age_s > _ABANDONED_AFTER_S
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
