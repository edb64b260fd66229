"""Room for the next checkpoint on a file system that is nearly full.

Old checkpoints are removed after a new one is complete, so for a moment there is one more than `checkpoint.keep`.
Where that does not fit, old ones are removed first, but never the newest that is complete: if the new one cannot be
written after all, the run can still be resumed. Nor are the best ones of `checkpoint.keep_best`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from forge.checkpoint.best import best_scores
from forge.checkpoint.manifest import step_name
from forge.checkpoint.storage import Storage
from forge.checkpoint.verify import stored_steps
from forge.units import format_bytes

NO_SPACE = "no space left"
"""Begins the reason of a checkpoint that did not fit; what waits for space looks for it."""


def is_full(error: OSError) -> bool:
    """Whether a write failed because a file system, or a user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def make_room(storage: Storage, *, needed_bytes: int | None, keep_best: int = 0) -> list[int]:
    """Remove old checkpoints, oldest first, until a new one fits; the newest complete one is kept.

    Args:
        needed_bytes: of the new checkpoint; None: remove all but the newest.
        keep_best: how many of the best checkpoints are kept, too.

    Returns: the steps of the removed ones.
    Raises: OSError, CheckpointError if the storage cannot be read.
    """
    removed: list[int] = []
    if needed_bytes is not None and _fits(storage, needed_bytes):
        return removed
    best = {score.step for score in best_scores(storage, count=keep_best)}
    for step in [step for step in list(stored_steps(storage))[:-1] if step not in best]:
        storage.remove(step_name(step))
        removed.append(step)
        if needed_bytes is not None and _fits(storage, needed_bytes):
            break
    return removed


def no_space_reason(storage: Storage, *, needed_bytes: int, removed: Iterable[int]) -> str:
    """Why a checkpoint could not be written, with the numbers.

    Raises: OSError, CheckpointError if the storage cannot be read.
    """
    free = storage.free_bytes()
    has = "" if free is None else f", and {format_bytes(free)} are free"
    steps = ", ".join(map(str, removed))
    gone = f"; the older checkpoints of step {steps} were removed for it" if steps else ""
    newest = max(stored_steps(storage), default=None)
    kept = "there is no older one" if newest is None else f"the checkpoint of step {newest} is kept"
    return (
        f"{NO_SPACE} in {storage.url}: the checkpoint needs about {format_bytes(needed_bytes)}{has}{gone}; {kept}"
    )


def _fits(storage: Storage, needed_bytes: int) -> bool:
    free = storage.free_bytes()
    return free is None or free >= needed_bytes
