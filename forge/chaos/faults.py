"""Fault injection: kill or suspend a rank, a node or the supervisor of a run, or announce a preemption.

The run's events tell which processes its ranks and agents are. Faults are injected into processes of this machine;
a simulated node is all processes of the session that its `ray start` began.
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

_IS_HEAD = "that node is the head, which the whole cluster ends with; choose another"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProcesses:
    """The processes of a run."""

    ranks: dict[int, int]
    """Process id by rank."""
    agents: dict[str, int]
    """Process id of the agent by node, in the order in which the nodes joined."""
    supervisor: int

    def node(self, name: str) -> str:
        """A node's name from its index in joining order, or from a prefix of its id. Raises: ArgumentError."""
        names = list(self.agents)
        if name.isdigit() and int(name) < len(names):
            return names[int(name)]
        found = [node for node in names if node.startswith(name)]
        if len(found) == 1:
            return found[0]
        raise ArgumentError(
            f"no node '{name}'; the nodes are {', '.join(f'{i}: {n}' for i, n in enumerate(names))}"
        )

    def rank(self, rank: int) -> int:
        """A rank's process id. Raises: ArgumentError."""
        if rank in self.ranks:
            return self.ranks[rank]
        raise ArgumentError(
            f"no rank {rank}; the ranks are {', '.join(map(str, sorted(self.ranks))) or 'none now'}"
        )


def processes_of(folder: Path) -> RunProcesses:
    """The processes of a run now. Raises: ArgumentError if the elastic engine is not running it."""
    run = read_run(folder)
    supervisors = [e["pid"] for e in run.events if e["event"] in ("SupervisorStarted", "SupervisorRestarted")]
    if run.status != "running" or not supervisors:
        raise ArgumentError(f"{folder.name} is not running on the elastic engine")
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
    """SIGKILL. Raises: ArgumentError if there is no such process."""
    _signal(pid, signal.SIGKILL)


def suspend(pid: int) -> None:
    """SIGSTOP: the process exists but makes no progress. Raises: ArgumentError if there is no such process."""
    _signal(pid, signal.SIGSTOP)


def kill_node_of(agent_pid: int) -> None:
    """Kill every process of a simulated node at once.

    Raises: ArgumentError if it is the head node, or not a node that was started on this machine.
    """
    try:
        leader = os.getsid(agent_pid)
    except ProcessLookupError:
        raise ArgumentError(f"this machine has no process {agent_pid}") from None
    cluster = find_local()
    if cluster is None or leader not in [node.pid for node in cluster.nodes]:
        raise ArgumentError("only nodes that `forge cluster up` has started on this machine can be killed")
    if leader == cluster.nodes[0].pid:
        raise ArgumentError(_IS_HEAD)
    for process in session_members(leader):
        with contextlib.suppress(psutil.Error):
            process.kill()


def give_notice(node: str, *, seconds_left: float) -> None:
    """Announce that a node will be preempted, as `ray drain-node` does, without preempting it.

    Raises: ArgumentError if it is the head node, or not a node of this cluster; ClusterError if Ray refuses.
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
    """Mark a node as draining. Raises: ClusterError if Ray refuses or does not answer."""
    try:
        drain(node_id, seconds_left, gcs_address=address)
    except Exception as error:  # Ray raises many unrelated classes here
        raise ClusterError(f"cannot drain node {node_id[:8]}: {error}") from error


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise ArgumentError(f"this machine has no process {pid}") from None
