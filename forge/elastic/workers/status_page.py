"""A page of shared memory between one rank and its agent: how far the rank is, and what is wished of it.

Nothing is sent while a rank trains: it counts in its own words, the agent in others, and each reads the
other's when it wants to know. A word has eight bytes and is written at once. The memory has no name
(`memfd`) and goes with the last of the two.
"""

from __future__ import annotations

import mmap
import os
import weakref
from enum import IntEnum, auto


class StatusField(IntEnum):
    """The words of a status."""

    # written by the rank
    PROGRESS_NS = 0
    """When it last did something (a micro-step, an update, a part of forming), by the machine's monotonic clock."""
    STEP = auto()
    """The last step that is complete; the first rank's alone."""
    STEP_NS = auto()
    """How long it took."""
    # written by the agent
    STOP = auto()
    """Wished: checkpoint, then end the run."""
    DRAIN = auto()
    """Wished: end this generation after the step."""
    REPLICATED_STEP = auto()
    """The newest step whose snapshot lies on another machine too."""
    RECORDED_STEP = auto()
    """The newest step that stands in `metrics.jsonl`."""
    AGENT_CPU_NS = auto()
    """Processor time of the agent while it sent copies to another machine."""


class StatusPage:
    """The words, by name; use `create_status_page` or `open_board`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)
        self._words = memoryview(self._memory).cast("q")
        # An agent lets go of the status pages of a generation by forgetting its ranks.
        self._closes = weakref.finalize(self, os.close, fd)

    def __getitem__(self, word: StatusField) -> int:
        return self._words[word]

    def __setitem__(self, word: StatusField, value: int) -> None:
        self._words[word] = value

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._memory.close()
        self._closes()


def create_status_page() -> StatusPage:
    """A status of zeros. Raises: OSError if the system gives no memory."""
    fd = os.memfd_create("forge-status")
    os.ftruncate(fd, mmap.PAGESIZE)
    return StatusPage(fd)
