"""Fault injection into nodes: kill a simulated node of this machine, or announce a preemption.

A simulated node is all processes of the session that its `ray start` began. Signals to single processes of a run
are in `forge.chaos.processes`.
"""

from __future__ import annotations

import contextlib
import os

import psutil

from forge.cluster.local.ray_cluster import find_local
from forge.cluster.local.ray_process import session_members
from forge.errors import ArgumentError, ClusterError
from forge.runtime.placement import drain, nodes_alive

_IS_HEAD = "that node is the head, which the whole cluster ends with; choose another"


def kill_node_of(agent_pid: int) -> None:
    """Kill every process of a simulated node at once.

    Raises: ArgumentError if it is the head node, or not a node that was started on this machine.
    """
    try:
        leader = os.getsid(agent_pid) if agent_pid > 1 else 0
    except (OSError, OverflowError):
        raise ArgumentError(f"this machine has no process {agent_pid}") from None
    cluster = find_local()
    if cluster is None or leader not in [node.pid for node in cluster.nodes if node.is_alive]:
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
