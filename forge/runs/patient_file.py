"""Append lines to a file whose disk may be full for a while.

A large checkpoint can fill the disk that the run folder is on, and is removed when it cannot be completed. Records
wait in memory meanwhile, so that they are neither lost nor written twice, and training continues.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Any, TextIO

_MAX_WAITING_BYTES = 64 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class PatientFile:
    """A file that ends with a whole line, and the lines that wait for space."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError as `open_whole_lines`."""
        self._path = path
        with open_whole_lines(path) as file:
            self._file = os.fdopen(os.dup(file.fileno()), "ab", buffering=0)
        self._waiting = b""

    def write_line(self, line: str) -> None:
        """Write a line, or keep it while the disk is full.

        Raises: OSError if it cannot be written for another reason, or too much waits.
        """
        is_first = not self._waiting
        self._waiting += line.encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as error:
            if error.errno not in _FULL or len(self._waiting) > _MAX_WAITING_BYTES:
                raise
            if is_first:
                with contextlib.suppress(OSError):  # the log may be on the same disk
                    sys.stderr.write(f"{self._path}: {error.strerror}; records wait in memory\n")
                    sys.stderr.flush()

    def sync(self) -> None:
        """Flush to disk what does not wait for space."""
        try:
            self._write_waiting()
        except OSError as error:
            if error.errno not in _FULL:
                raise
        os.fsync(self._file.fileno())

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def open_whole_lines(path: Path) -> TextIO:
    """Open a file for appending, after removing a partial last line.

    Raises: OSError if it cannot be written, or is a link, which may lead to another file.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(os.dup(handle), "rb+") as file:
        file.truncate(_end_of_last_line(file))
    return os.fdopen(handle, "a", encoding="utf-8")


def _end_of_last_line(file: Any) -> int:
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 4096)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        position = start
    return 0
