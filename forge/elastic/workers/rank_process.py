"""What an agent knows of the process of one rank."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass, field

from forge.elastic.replicas.replicate import Replicator
from forge.elastic.rpc import Endpoint
from forge.elastic.workers.status_page import StatusField, StatusPage
from forge.limits import out_of_memory_kills
from forge.process import is_suspended

# A rank that has made progress since then is not suspended: the kernel takes 1 ms to describe a large process.
_SUSPECT_MS = 1000


@dataclass(slots=True, kw_only=True)
class RankProcess:
    """One rank's process, from the request to fork it until it is reaped."""

    generation: int
    rank: int
    local_rank: int
    world_size: int
    socket: socket.socket
    status: StatusPage
    peer: Endpoint | None
    is_sent: bool = True
    """Whether its snapshots are sent to another node."""
    started_ns: int = field(default_factory=time.monotonic_ns)
    send_began_ns: int = 0
    """The agent's CPU time when it began to replicate the last snapshot."""
    num_memory_kills: int = field(default_factory=out_of_memory_kills)
    """Of the kernel on this machine, when the rank was started."""
    pid: int | None = None
    device_name: str = ""
    """Of its GPU or processor, once it has reported it."""
    replicator: Replicator | None = None
    has_reported_end: bool = False
    must_die: bool = False
    """It was ordered to be killed, which is done as soon as its pid is known."""
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)

    def note_replicated(self, step: int) -> None:
        """Publish to the rank that the snapshot of a step is replicated."""
        self.status[StatusField.AGENT_CPU_NS] += time.process_time_ns() - self.send_began_ns
        self.status[StatusField.REPLICATED_STEP] = step

    def own_time(self) -> list[int]:
        """Return rank, median time of its own work in its last steps in ns, steps that it has timed."""
        return [self.rank, self.status[StatusField.OWN_NS], self.status[StatusField.OWN_STEPS]]

    def progress(self) -> list[int]:
        """Return rank, ms since its last progress, last step, its duration in ns, is suspended."""
        status = self.status
        silent_ms = (time.monotonic_ns() - max(status[StatusField.PROGRESS_NS], self.started_ns)) // 10**6
        suspended = silent_ms >= _SUSPECT_MS and self.pid is not None and is_suspended(self.pid)
        return [self.rank, silent_ms, status[StatusField.STEP], status[StatusField.STEP_NS], int(suspended)]
