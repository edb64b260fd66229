"""Read the end of one of a run's logs, and follow it while the run is running."""

from __future__ import annotations

import errno
import itertools
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
_MAX_FILES = 10_000
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
    try:
        text = read_file_end(_log_path(folder, name), max_bytes=_MAX_BYTES).decode(errors="replace")
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = getattr(error, "strerror", None) or str(error)
        problem = "does not exist" if is_missing else f"cannot be read: {reason}"
        names = ", ".join(log_names(folder)[:_MAX_LISTED]) or "none yet"
        raise ArgumentError(f"{folder / 'logs' / name}.log {problem}; its logs are: {names}") from None
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
        with os.fdopen(open_file(_log_path(folder, name)), "rb") as file:
            file.seek(offset)
            text = file.read(_MAX_BYTES)
            return text.decode(errors="replace"), file.tell()
    except (OSError, ValueError):
        return "", offset


def log_size(folder: Path, *, name: str) -> int:
    """Return the size of a log in bytes; 0 if it does not exist."""
    try:
        return _log_path(folder, name).lstat().st_size
    except (OSError, ValueError):
        return 0


def log_names(folder: Path) -> list[str]:
    """Return the names of a run's logs, `rank-2` before `rank-10`; none if their folder is a link."""
    logs = folder / "logs"
    names = [] if logs.is_symlink() else [path.stem for path in itertools.islice(logs.glob("*.log"), _MAX_FILES)]
    parts = {name: re.split(r"([0-9]{1,9})", name) for name in names}  # every second one is a number
    return sorted(names, key=lambda name: [int(part) if i % 2 else part for i, part in enumerate(parts[name])])


class LogTail:
    """Reads the end of one of a run's logs, then what is appended to it, a bounded part at a time."""

    def __init__(self, folder: Path, *, name: str, max_bytes: int = 2**16) -> None:
        self._folder, self._name, self._max_bytes = folder, name, max_bytes
        self._offset = -1

    def read(self) -> str:
        """Return the whole lines since the last call; what is more than `max_bytes` is left out, with a line.

        A log that became shorter is read as a new one. Nothing if the log does not exist or is a link.
        """
        try:
            with os.fdopen(open_file(_log_path(self._folder, self._name)), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                is_new = not 0 <= self._offset <= size
                wanted = 0 if is_new else self._offset
                start = max(wanted, size - self._max_bytes)
                file.seek(start)
                data = file.read(self._max_bytes)
        except (OSError, ValueError):
            return ""
        end = data.rfind(b"\n") + 1 or (len(data) if len(data) == self._max_bytes else 0)
        self._offset = start + end
        text = data[:end].decode(errors="replace")
        if start > wanted and end:
            head, _, rest = text.partition("\n")
            text = f"[{start - wanted + len(head):,} bytes are left out]\n{rest or head}"
        return text


def _log_path(folder: Path, name: str) -> Path:
    """Raises: ValueError if that is not the name of a file; OSError if the folder of the logs is a link."""
    path = folder / "logs" / file_name(f"{name}.log")
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, "its folder is a link, which may lead outside the run folder")
    return path
