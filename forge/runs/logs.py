"""Read the end of one of a run's logs, and follow it while the run is running."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from forge.errors import ArgumentError
from forge.foreign import file_name, open_file, read_file_end

_MAX_BYTES = 2**24
"""Of a log's end; a rank that prints without end may have written any amount."""

_MAX_LISTED = 100
_POLL_S = 0.2
_CHUNK_BYTES = 2**16


def last_lines(folder: Path, *, name: str, lines: int) -> str:
    """Return the last lines of `logs/<name>.log` of a run folder, never of a file elsewhere.

    Raises: ArgumentError listing the logs of the run.
    """
    logs = folder / "logs"
    path = logs / f"{name}.log"
    try:
        file_name(f"{name}.log")
        if logs.is_symlink():
            raise OSError(errno.ELOOP, "its folder is a link, which may lead outside the run folder")
        text = read_file_end(path, max_bytes=_MAX_BYTES).decode(errors="replace")
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = getattr(error, "strerror", None) or str(error)
        problem = "does not exist" if is_missing else f"cannot be read: {reason}"
        names = ", ".join(sorted(log.stem for log in logs.glob("*.log"))[:_MAX_LISTED]) or "none yet"
        raise ArgumentError(f"{path} {problem}; its logs are: {names}") from None
    return "".join(text.splitlines(keepends=True)[-lines:])


def follow_log(folder: Path, *, name: str, offset: int, goes_on: Callable[[], bool]) -> Iterator[str]:
    """Yield what is appended to a log, until the run has ended. A log that became shorter is read from its start.

    Args:
        name: of a log that `last_lines` has read.
        offset: bytes of the log that were read before.
        goes_on: returns whether more may be written.
    """
    path = folder / "logs" / f"{name}.log"
    while True:
        is_last = not goes_on()  # before reading, so that the last lines are read too
        with os.fdopen(open_file(path), "rb") as file:
            if os.fstat(file.fileno()).st_size < offset:
                offset = 0
            file.seek(offset)
            while chunk := file.read(_CHUNK_BYTES):
                offset = file.tell()
                yield chunk.decode(errors="replace")
        if is_last:
            return
        time.sleep(_POLL_S)


def log_size(folder: Path, *, name: str) -> int:
    """Return the size of a log in bytes; 0 if it does not exist."""
    try:
        return (folder / "logs" / f"{file_name(name)}.log").lstat().st_size
    except (OSError, ValueError):
        return 0
