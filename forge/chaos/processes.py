"""The processes of a run on this machine, and signals to them.

The run's events name the process ids of its ranks, agents and supervisor. A run folder may come from elsewhere, and
a pid may belong to another process by now, so an id is believed only if its process is in the session of the run's
driver or of a node that `forge cluster up` has started here, or descends from one of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from forge.cluster.local.ray_cluster import find_local
from forge.errors import ArgumentError
from forge.process import has_open
from forge.runs.lock import LOCK, driver_pid
from forge.runs.nodes import nodes_now
from forge.runs.reader import read_run
from forge.runs.remote_ref import read_remote_ref

# Of a process that is slowed down: shorter than a forward pass, so that every one is slowed.
_SLOW_PERIOD_S = 0.006


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProcesses:
    """The processes of a run, as its events name them; None: not known yet."""

    ranks: dict[int, int | None]
    """Process id by rank."""
    agents: dict[str, int]
    """Process id of the agent by node, in the order in which the nodes joined."""
    supervisor: int
    roots: frozenset[int]
    """The run's driver and the nodes of the cluster on this machine, from which its processes descend."""

    def node(self, name: str) -> str:
        """A node's name from its index in joining order, or from a prefix of its id. Raises: ArgumentError."""
        names = list(self.agents)
        if name.isdecimal() and len(name) < 10 and int(name) < len(names):
            return names[int(name)]
        found = [node for node in names if node.startswith(name)]
        if len(found) == 1:
            return found[0]
        raise ArgumentError(
            f"no node '{name}'; the nodes are {', '.join(f'{i}: {n}' for i, n in enumerate(names))}"
        )

    def rank(self, rank: int) -> int:
        """A rank's process id. Raises: ArgumentError."""
        if rank not in self.ranks:
            known = ", ".join(map(str, sorted(self.ranks))) or "none now"
            raise ArgumentError(f"no rank {rank}; the ranks are {known}")
        pid = self.ranks[rank]
        if pid is None:
            raise ArgumentError(f"the process of rank {rank} is not known yet; try again in a moment")
        return pid

    def require_own(self, pid: int) -> None:
        """Raises: ArgumentError unless this is a process of the run, on this machine."""
        if pid <= 1:
            raise ArgumentError(f"the run's events name {pid} as a process, which is none of its own")
        try:
            process = psutil.Process(pid)
            family = {os.getsid(pid), pid, *(parent.pid for parent in process.parents())}
            is_own = process.uids().real == os.getuid() and bool(family & self.roots)
        except (psutil.Error, OSError, OverflowError):
            raise ArgumentError(f"this machine has no process {pid}") from None
        if not is_own:
            raise ArgumentError(
                f"the run's events name process {pid}, which does not belong to the run: neither its driver nor a "
                "node of the cluster on this machine has started it"
            )


def processes_of(folder: Path) -> RunProcesses:
    """The processes of a run now. Raises: ArgumentError if the elastic engine is not running it on this machine."""
    ref = read_remote_ref(folder)
    if ref is not None:
        raise ArgumentError(
            f"{folder.name} is on the cluster '{ref.cluster}': its processes are on other machines, and this "
            "command sends signals on this one only"
        )
    run, driver = read_run(folder), driver_pid(folder)
    supervisors = [e["pid"] for e in run.events if e["event"] in ("SupervisorStarted", "SupervisorRestarted")]
    if run.status != "running" or driver is None or not supervisors:
        raise ArgumentError(f"{folder.name} is not running on the elastic engine")
    ranks: dict[int, int | None] = {}
    for event in run.events:
        match event["event"]:
            case "GenerationStarted":
                ranks = {place["rank"]: place["pid"] for place in event["ranks"]}
            case "MembershipChangeStarted" | "RunStarted":
                ranks = {}
    cluster = find_local()
    roots = {node.pid for node in cluster.nodes if node.is_alive} if cluster is not None else set()
    if driver > 1 and has_open(driver, folder / LOCK):
        roots.add(driver)
    agents = {node.name: node.agent_pid for node in nodes_now(run.events)}
    return RunProcesses(ranks=ranks, agents=agents, supervisor=supervisors[-1], roots=frozenset(roots))


def kill(pid: int, *, members: RunProcesses) -> None:
    """SIGKILL. Raises: ArgumentError if there is no such process, or it is not one of the run."""
    _signal(pid, signal.SIGKILL, members=members)


def suspend(pid: int, *, members: RunProcesses) -> None:
    """SIGSTOP: the process exists but makes no progress. Raises: ArgumentError as `kill`."""
    _signal(pid, signal.SIGSTOP, members=members)


def slow_down(pid: int, *, members: RunProcesses, factor: float, seconds: float) -> bool:
    """Stop and continue a process in turns, so that what it computes takes `factor` times as long.

    Args:
        factor: above 1; the process runs for `1 / factor` of the time.
        seconds: how long; then, or when this is interrupted, it continues at full speed.

    Returns: whether it still runs; False if it ended in the meantime.
    Raises: ArgumentError as `kill`.
    """
    with _own_process(pid, members=members) as handle:
        deadline, ran_s = time.monotonic() + seconds, _SLOW_PERIOD_S / factor
        try:
            while time.monotonic() < deadline:
                signal.pidfd_send_signal(handle, signal.SIGSTOP)
                time.sleep(ran_s * (factor - 1))
                signal.pidfd_send_signal(handle, signal.SIGCONT)
                continued_at = time.monotonic()
                time.sleep(_SLOW_PERIOD_S / factor)
                # On a busy machine this process wakes late, so that the other one runs for longer than that.
                ran_s = time.monotonic() - continued_at
        except ProcessLookupError:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGCONT)
    return True


def _signal(pid: int, number: signal.Signals, *, members: RunProcesses) -> None:
    with _own_process(pid, members=members) as handle:
        signal.pidfd_send_signal(handle, number)


@contextlib.contextmanager
def _own_process(pid: int, *, members: RunProcesses) -> Iterator[int]:
    """Open a descriptor of one of the run's processes. Raises: ArgumentError."""
    if pid <= 1:
        members.require_own(pid)
    try:
        handle = os.pidfd_open(pid)  # so that the pid cannot change its process after the check
    except (OSError, OverflowError):
        raise ArgumentError(f"this machine has no process {pid}") from None
    try:
        members.require_own(pid)
        yield handle
    except OSError as error:
        raise ArgumentError(f"process {pid} cannot be signalled: {error.strerror}") from None
    finally:
        os.close(handle)
