"""Notice that Ray's memory monitor kills processes of a run, and decide when it has done so too often.

Ray kills workers while a node's memory is above a threshold (`RAY_memory_usage_threshold`, 0.95). It knows its own
actors only, not the ranks, which are children of an agent and end with it. Actors that can be restarted are killed
first, and killing them frees little, so without a limit the same happens for ever. Ray never kills the driver.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from forge.events import KilledForMemory
from forge.runtime.actor_names import AGENT, CORPUS_SERVER, RECORDER, SUPERVISOR

MAX_ROUNDS = 3
"""Rounds of kills in a row after which the run ends."""
QUIET_S = 60.0
"""Rounds are in a row unless the run trained at least a step and this time between them."""
_SAME_ROUND_S = 1.0
_USED = re.compile(r"was ([\d.]+)GB used / ([\d.]+)GB limit")
_KILLED = re.compile(r"task name=([^,]+):[^,:]*\.__init__, .*?pid=(\d+),.*?worker ID=([0-9a-f]+)")
_ROLES = {RECORDER: "recorder", SUPERVISOR: "supervisor", CORPUS_SERVER: "corpus server", AGENT: "agent"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadWorker:
    """A worker process of Ray that its memory monitor killed, as Ray's table of workers describes it."""

    worker_id: str
    host: str
    detail: str
    """Ray's text about the kill: the node's memory, and all workers that were considered."""


class MemoryWatch:
    """The kills of one run's actors."""

    def __init__(
        self,
        run_id: str,
        *,
        read: Callable[[], Iterable[DeadWorker]],
        num_steps: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        read: returns the workers that Ray's memory monitor has killed so far, in the whole cluster.
        num_steps: returns the steps that the run has recorded so far.
        """
        self._run_id, self._read, self._num_steps, self._clock = run_id, read, num_steps, clock
        self._seen = {dead.worker_id for dead in read()}
        self._num_rounds, self._round_at, self._steps_then = 0, -math.inf, 0

    def look(self) -> list[KilledForMemory]:
        """Return the run's actors that were killed since the last call, and count the rounds."""
        new = [dead for dead in self._read() if dead.worker_id not in self._seen]
        self._seen |= {dead.worker_id for dead in new}
        kills = [kill for dead in new if (kill := describe_kill(dead, run_id=self._run_id)) is not None]
        if kills:
            self._count()
        return kills

    @property
    def is_over(self) -> bool:
        """Whether the run must end."""
        return self._num_rounds >= MAX_ROUNDS

    def _count(self) -> None:
        now, steps = self._clock(), self._num_steps()
        if now - self._round_at > QUIET_S and steps > self._steps_then:
            self._num_rounds = 0
        if now - self._round_at > _SAME_ROUND_S:
            self._num_rounds += 1
            self._steps_then = steps
        self._round_at = now


def describe_kill(dead: DeadWorker, *, run_id: str) -> KilledForMemory | None:
    """Return the event of a killed worker; None if it was no actor of this run."""
    found = next((one for one in _KILLED.findall(dead.detail) if one[2] == dead.worker_id), None)
    if found is None:
        return None
    actor, pid, _ = found
    role, name = next(((role, actor[len(at) :]) for at, role in _ROLES.items() if actor.startswith(at)), ("", ""))
    if not re.fullmatch(rf"{re.escape(run_id)}([-.].*)?", name):
        return None
    memory = _USED.search(dead.detail)
    used, limit = map(float, memory.groups()) if memory else (math.nan, math.nan)
    return KilledForMemory(
        process=role,
        node=name[len(run_id) + 1 :],
        host=dead.host,
        pid=int(pid),
        used_gib=used,
        limit_gib=limit,
    )


def too_little_memory(kill: KilledForMemory) -> str:
    """The message of a run that ends because Ray's memory monitor has killed its processes too often."""
    return (
        f"Ray's memory monitor killed processes of this run {MAX_ROUNDS} times in a row, the last time the "
        f"{kill.process} on {kill.host}, which used {kill.used_gib:.1f} of {kill.limit_gib:.1f} GiB. End what else "
        "uses memory there, use fewer workers on a node or nodes with more memory, or let each worker hold less "
        "(training.zero.stage: 3, a smaller model). Ray kills above the share RAY_memory_usage_threshold (0.95), "
        "which its nodes read when they start"
    )


def killed_workers() -> list[DeadWorker]:
    """Read the workers that the memory monitors of this cluster have killed from Ray's control store."""
    import ray
    from ray.core.generated import common_pb2, gcs_pb2

    rows = ray._private.state.state._connect_and_get_accessor().get_worker_table()
    killed = common_pb2.WorkerExitType.Value("NODE_OUT_OF_MEMORY")
    workers = [gcs_pb2.WorkerTableData.FromString(row) for row in rows]
    return [
        DeadWorker(
            worker_id=worker.worker_address.worker_id.hex(),
            host=worker.worker_address.ip_address,
            detail=worker.exit_detail,
        )
        for worker in workers
        if not worker.is_alive and worker.exit_type == killed
    ]
