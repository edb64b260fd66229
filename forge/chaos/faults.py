"""Single faults, by hand: what a machine, a process or a cloud may do to a run.

The run's own events say where its ranks and agents are. Faults are dealt out to processes of this machine;
a node of a local cluster is all the processes that its `ray start` began.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import psutil

from forge.cluster.local.ray_cluster import find_local
from forge.cluster.local.ray_process import session_members
from forge.errors import ArgumentError, ClusterError
from forge.runs.reader import read_run
from forge.runtime.placement import drain, nodes_alive

_IS_HEAD = "that node is the head, and the cluster ends with it; choose another"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProcesses:
    """Where a run is at work."""

    ranks: dict[int, int]
    """Process by rank."""
    agents: dict[str, int]
    """Process of the agent by node, in the order in which they joined."""
    supervisor: int

    def node(self, name: str) -> str:
        """A node by its number in the order of joining, or by a beginning of its id. Raises: ArgumentError."""
        names = list(self.agents)
        if name.isdigit() and int(name) < len(names):
            return names[int(name)]
        found = [node for node in names if node.startswith(name)]
        if len(found) == 1:
            return found[0]
        raise ArgumentError(f"no node '{name}'; there are {', '.join(f'{i}: {n}' for i, n in enumerate(names))}")

    def rank(self, rank: int) -> int:
        """A rank's process. Raises: ArgumentError."""
        if rank in self.ranks:
            return self.ranks[rank]
        raise ArgumentError(f"no rank {rank}; there are {', '.join(map(str, sorted(self.ranks))) or 'none now'}")


def processes_of(folder: Path) -> RunProcesses:
    """Where a run is at work now. Raises: ArgumentError if it does not go on, or not with the elastic engine."""
    run = read_run(folder)
    supervisors = [e["pid"] for e in run.events if e["event"] in ("SupervisorStarted", "SupervisorRestarted")]
    if run.status != "running" or not supervisors:
        raise ArgumentError(f"{folder.name} is not being carried on now by the elastic engine")
    agents: dict[str, int] = {}
    ranks: dict[int, int] = {}
    for event in run.events:
        match event["event"]:
            case "NodeJoined":
                agents[event["node"]] = event["agent_pid"]
            case "NodeLeft":
                agents.pop(event["node"], None)
            case "GenerationStarted":
                ranks = {place["rank"]: place["pid"] for place in event["ranks"]}
            case "MembershipChangeStarted" | "RunStarted":
                ranks = {}
    return RunProcesses(ranks=ranks, agents=agents, supervisor=supervisors[-1])


def kill(pid: int) -> None:
    """SIGKILL. Raises: ArgumentError if there is no such process here."""
    _signal(pid, signal.SIGKILL)


def halt(pid: int) -> None:
    """SIGSTOP: it is there, and does nothing. Raises: ArgumentError if there is no such process here."""
    _signal(pid, signal.SIGSTOP)


def kill_machine(agent_pid: int) -> None:
    """Have a simulated machine vanish: every process of its session, at once.

    Raises: ArgumentError if it is the head, which holds the whole cluster, or not of this machine.
    """
    try:
        leader = os.getsid(agent_pid)
    except ProcessLookupError:
        raise ArgumentError(f"there is no process {agent_pid} on this machine") from None
    cluster = find_local()
    if cluster is None or leader not in [node.pid for node in cluster.nodes]:
        raise ArgumentError("only a node of the cluster that `forge cluster up` started here can be killed")
    if leader == cluster.nodes[0].pid:
        raise ArgumentError(_IS_HEAD)
    for process in session_members(leader):
        with contextlib.suppress(psutil.Error):
            process.kill()


def give_notice(node: str, *, seconds_left: float) -> None:
    """Announce that a node will be taken away, as `ray drain-node` does; nobody takes it away.

    Raises: ArgumentError if it is the head, which holds the whole cluster, or not of this one; ClusterError.
    """
    cluster = find_local()
    if cluster is None:
        raise ArgumentError("no cluster is up on this machine")
    nodes = nodes_alive(gcs_address=cluster.address)
    found = [node_id for node_id in nodes if node_id.startswith(node.partition("-")[0])]
    if len(found) != 1:
        raise ArgumentError(f"the cluster has no node {node}")
    if nodes[found[0]]:
        raise ArgumentError(_IS_HEAD)
    drain_node(found[0], seconds_left=seconds_left, address=cluster.address)


def drain_node(node_id: str, *, seconds_left: float, address: str) -> None:
    """Raises: ClusterError if Ray refuses, or there is no such cluster."""
    try:
        drain(node_id, seconds_left, gcs_address=address)
    except Exception as error:  # Ray raises many unrelated classes here
        raise ClusterError(f"node {node_id[:8]} cannot be drained: {error}") from error


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise ArgumentError(f"there is no process {pid} on this machine") from None
