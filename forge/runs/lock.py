"""The lock of a run folder: its driver holds it while the run is running."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from forge.errors import ArgumentError
from forge.foreign import open_file
from forge.process import is_alive

LOCK = ".lock"
"""Held by the driver of a running run; contains its pid."""
_MAX_PID_CHARS = 20
_MAX_PID = 2**22  # PID_MAX_LIMIT of Linux
# A driver needs microseconds between taking the lock and writing its pid into it.
_PID_PATIENCE_S = 0.2


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold a run's lock, so that no driver starts meanwhile.

    Raises: ArgumentError if a driver holds it, or if the lock file cannot be opened.
    """
    try:
        handle = os.open(
            folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644
        )
    except OSError as error:
        raise ArgumentError(f"{folder.name} cannot be locked: {folder / LOCK}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ArgumentError(
            f"{folder.name} is running; wait for its end, or stop it first: forge runs stop {folder.name}"
        ) from None
    finally:
        os.close(handle)


def driver_pid(folder: Path) -> int | None:
    """Return the pid of a run's driver; None if it has none.

    Uses a shared lock, so that two callers at once do not take each other for a driver.
    """
    try:
        with os.fdopen(open_file(folder / LOCK)) as lock:
            deadline = time.monotonic() + _PID_PATIENCE_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return None
                except BlockingIOError:
                    lock.seek(0)
                    pid = int(lock.read(_MAX_PID_CHARS) or 0)
                if not 1 < pid < _MAX_PID:
                    pid = 0
                # A dead pid is that of an earlier driver: the current one has yet to write its own.
                if pid and (is_alive(pid) or time.monotonic() > deadline):
                    return pid
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.01)
    except (OSError, ValueError):
        return None
