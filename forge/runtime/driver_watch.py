"""What ends a run from outside: its folder is removed, or Ray's memory monitor kills its processes all the time.

The driver runs `watch_run` on a thread of its own, because its main thread waits for answers that may never come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from forge.errors import RunError
from forge.events import KilledForMemory
from forge.runs.lock import LOCK
from forge.runs.recorder import last_recorded_step
from forge.runtime.memory_watch import MemoryWatch, killed_workers, too_little_memory

_POLL_S = 1.0


def watch_run(
    folder: Path,
    *,
    is_over: threading.Event,
    record: Callable[[KilledForMemory], None],
    end: Callable[[RunError], None],
) -> None:
    """Watch a run until it is over.

    Args:
        folder: the run folder; its driver holds the lock file in it.
        record: called for each process that Ray's memory monitor has killed.
        end: called with the reason if the run must end at once.
    """
    lock = _identity(folder / LOCK)
    memory = MemoryWatch(folder.name, read=killed_workers, num_steps=lambda: last_recorded_step(folder))
    while not is_over.wait(_POLL_S):
        if lock is None or _identity(folder / LOCK) != lock:
            end(RunError(f"the run folder {folder} was removed or moved"))
            return
        kills = memory.look()
        for kill in kills:
            record(kill)
        if memory.is_over:
            end(RunError(too_little_memory(kills[-1])))
            return


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
