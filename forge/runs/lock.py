"""The lock of a run folder: its driver holds it while the run is running."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from forge.errors import ArgumentError
from forge.runs.reader import LOCK


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
