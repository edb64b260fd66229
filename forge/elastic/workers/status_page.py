"""A page of shared memory between one rank and its agent: the rank's progress, and control flags for the rank.

No messages are needed while a rank trains: the rank writes some fields, the agent writes others, and each reads the
other's. A field has eight bytes and is written atomically. The memory is anonymous (`memfd`) and is freed with the
last process that uses it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from enum import IntEnum, auto


class StatusField(IntEnum):
    """The fields of a status page."""

    # written by the rank
    PROGRESS_NS = 0
    """When it last made progress (a micro-step, an update, a part of its startup), by the monotonic clock."""
    STEP = auto()
    """The last complete step; rank 0 only."""
    STEP_NS = auto()
    """Duration of that step."""
    OWN_NS = auto()
    """Median time of the rank's own work in its last steps, without waits for other ranks."""
    OWN_STEPS = auto()
    """Steps timed when that median was taken; 0 before the first."""
    # written by the agent
    STOP = auto()
    """1: write a checkpoint and end the run."""
    DRAIN = auto()
    """1: end this generation after the current step."""
    REPLICATED_STEP = auto()
    """The newest step whose snapshot is complete on another node."""
    RECORDED_STEP = auto()
    """The newest step in `metrics.jsonl`."""
    AGENT_CPU_NS = auto()
    """CPU time that the agent has spent on replicating snapshots."""


class StatusPage:
    """The fields of a page, by name; created by `create_status_page` or from its file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)
        self._fields = memoryview(self._memory).cast("q")
        # An agent closes the pages of a generation by dropping its references to the workers.
        self._close_fd = weakref.finalize(self, os.close, fd)

    def __getitem__(self, field: StatusField) -> int:
        return self._fields[field]

    def __setitem__(self, field: StatusField, value: int) -> None:
        self._fields[field] = value

    def close(self) -> None:
        """Unmap the memory and close the descriptor."""
        self._fields.release()
        self._memory.close()
        self._close_fd()


def create_status_page() -> StatusPage:
    """Create a page of zeros. Raises: OSError if there is not enough memory."""
    fd = os.memfd_create("forge-status")
    os.ftruncate(fd, mmap.PAGESIZE)
    return StatusPage(fd)
