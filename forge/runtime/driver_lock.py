"""The lock of a run folder, which the run's driver holds as long as it lives."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import TextIO

_LOCK_PATIENCE_S = 1.0


def acquire_lock(path: Path) -> TextIO:
    """Lock the run and write this process's id into the lock file. Readers of the id also lock it, briefly."""
    lock = path.open("a+")
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit(f"another driver process holds {path}")
            time.sleep(0.02)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
