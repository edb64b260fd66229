"""Read the end of one of a run's logs, and follow it while the run is running."""

from __future__ import annotations

import errno
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from forge.errors import ArgumentError
from forge.foreign import file_name, open_file, read_file_end

_MAX_BYTES = 2**24
"""Of a log's end; a rank that prints without end may have written any amount."""

_WARNING = re.compile(r"\S*/(?:site|dist)-packages/\S+:\d+: (\w*Warning): ")
_SOURCE_LINE = re.compile(r"  (?! |File )")
_MAX_WARNING_LINES = 3
_MAX_LISTED = 100
_POLL_S = 0.2
_CHUNK_BYTES = 2**16


class LibraryWarnings:
    """Folds the warnings that Python prints for code of installed packages, and counts them by category.

    Warnings of the user's own code, errors and everything else stay. A warning is its first line, of the form
    `/.../site-packages/x.py:1: FutureWarning: text`, more lines of its text, and the indented source line.

    Args:
        are_shown: keep them, and count nothing.
    """

    def __init__(self, *, are_shown: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self._are_shown = are_shown
        self._partial = ""
        self._held: list[str] = []
        """Lines after the first of a warning, which belong to it if a source line follows."""
        self._is_open = False

    def fold(self, text: str) -> str:
        """Return a whole text without the warnings."""
        return self.feed(text) + self.close()

    def feed(self, text: str) -> str:
        """Return what of the text so far is no part of a warning; an incomplete line waits for its end."""
        if self._are_shown:
            return text
        *lines, self._partial = (self._partial + text).split("\n")
        return "".join(self._take(f"{line}\n") for line in lines)

    def close(self) -> str:
        """Return what has waited, at the end of the text."""
        waiting, self._partial = "".join(self._held) + self._partial, ""
        self._held, self._is_open = [], False
        return waiting

    def _take(self, line: str) -> str:
        begin = _WARNING.match(line)
        if begin is not None:
            before, self._held, self._is_open = "".join(self._held), [], True
            self.counts[begin[1]] += 1
            return before
        if not self._is_open:
            return line
        if _SOURCE_LINE.match(line):
            self._held, self._is_open = [], False
            return ""
        self._held.append(line)
        if len(self._held) < _MAX_WARNING_LINES and not line.startswith("Traceback "):
            return ""
        before, self._held, self._is_open = "".join(self._held), [], False
        return before


def last_lines(folder: Path, *, name: str, lines: int, warnings: LibraryWarnings | None = None) -> str:
    """Return the last lines of `logs/<name>.log` of a run folder, never of a file elsewhere.

    Args:
        warnings: what folds the warnings of libraries; None keeps them.

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
    text = text if warnings is None else warnings.fold(text)
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


def read_new(folder: Path, *, name: str, offset: int) -> tuple[str, int]:
    """Return what was appended to a log since `offset`, and the new offset; nothing if it does not exist."""
    try:
        with os.fdopen(open_file(folder / "logs" / file_name(f"{name}.log")), "rb") as file:
            file.seek(offset)
            text = file.read(_MAX_BYTES)
            return text.decode(errors="replace"), file.tell()
    except (OSError, ValueError):
        return "", offset


def log_size(folder: Path, *, name: str) -> int:
    """Return the size of a log in bytes; 0 if it does not exist."""
    try:
        return (folder / "logs" / f"{file_name(name)}.log").lstat().st_size
    except (OSError, ValueError):
        return 0
