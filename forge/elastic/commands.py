"""Build the commands that start a generation or flush replicas to storage, and the launch spec of a worker.

Functions of a decision, the membership state and the connected agents; they return one message per agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from forge.elastic.agent_connections import AgentConnection
from forge.elastic.messages import SharedMessage
from forge.elastic.rpc import Message
from forge.elastic.source_shards import SourceWriter, holders
from forge.elastic.states import FlushToStorage, MembershipState, StartGeneration
from forge.plan.checkpoint_interval import CheckpointRisk

LOOPBACK = "lo"
"""The network interface of ranks that are all on one node."""


def interface_of(host: str) -> str | None:
    """Return the name of the network interface with this address."""
    found = psutil.net_if_addrs()
    return next((str(name) for name in found if any(entry.address == host for entry in found[name])), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """Everything a worker needs to start, as JSON. File descriptors are indices into those sent with it."""

    generation: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: str
    gpus: list[str]
    """The run's GPUs on the node, as of `CUDA_VISIBLE_DEVICES`; empty on CPU."""
    num_threads: int
    """CPU threads of torch."""
    checkpoints: str
    log: str
    host: str
    """Address of rank 0's node, for the rendezvous."""
    port: int
    interface: str | None
    """Network interface for gloo and, of several nodes, for NCCL; None: they find one."""
    step: int
    shards: list[dict[str, Any]]
    """Snapshots to continue from: generation, rank, and `fd` or `endpoint`; empty: continue from storage."""
    checkpoint_risk: dict[str, Any] | None
    """With `checkpoint.every: auto`, the fields of a `CheckpointRisk`."""
    laps: dict[str, float]
    asked_at: float
    """When the worker was requested, by the node's monotonic clock."""
    secret: str
    num_shard_groups: int
    """Groups of ranks that each hold the whole state."""
    parts_per_shard: int
    """See `forge.train.snapshot_pieces`."""
    has_listener: bool = False


def start_commands(
    start: StartGeneration,
    *,
    state: MembershipState,
    connections: Mapping[str, AgentConnection],
    laps: Mapping[str, float],
    sources: SourceWriter,
    checkpoint_risk: CheckpointRisk | None = None,
) -> dict[str, Message]:
    """Return for each node the command that starts its ranks of a generation.

    Args:
        checkpoint_risk: with `checkpoint.every: auto`.
        laps: seconds of each part of the membership change so far.
        sources: knows which endpoints each agent has; the commands must be sent.
    """
    nodes = list(dict.fromkeys(start.assignment))
    ranks: dict[str, list[int]] = {node: [] for node in nodes}
    num_on_host: dict[str, int] = {}
    for rank, node in enumerate(start.assignment):
        ranks[node].append(rank)
        num_on_host[connections[node].host] = num_on_host.get(connections[node].host, 0) + 1
    common: Message = {
        "command": "start",
        "generation": start.generation,
        "world_size": len(start.assignment),
        "host": connections[nodes[0]].host,
        "port": connections[nodes[0]].rendezvous_port,
        "is_spread": len(num_on_host) > 1,
        "step": start.step,
        "laps": dict(laps),
        "checkpoint_risk": None if checkpoint_risk is None else asdict(checkpoint_risk),
        "is_stopping": state.is_stopping,
        "num_shard_groups": start.num_shard_groups,
        "parts_per_shard": start.parts_per_shard,
    }
    commands: dict[str, Message] = {}
    with_source: dict[int, SharedMessage] = {}
    source = sources.sources(start, state=state, connections=connections)
    for number, node in enumerate(nodes):
        peer = (
            nodes[(number + 1) % len(nodes)]
            if len(nodes) > 1
            else find_spare(node, state=state, connections=connections)
        )
        own = {
            "number": number,
            "ranks": ranks[node],
            "num_on_host": num_on_host[connections[node].host],
            "peer": list(connections[peer].endpoint) if peer is not None else None,
        }
        key = id(source[node])  # one object for all agents that have the same endpoints already
        if key not in with_source:
            with_source[key] = SharedMessage(common | {"source": source[node]})
        commands[node] = SharedMessage(own, common=with_source[key])
    return commands


def flush_commands(flush: FlushToStorage, *, state: MembershipState, token: str) -> dict[str, Message]:
    """By node, the command to write its shards of a checkpoint from memory."""
    ranks: dict[str, list[int]] = {}
    for rank, names in holders(flush.generation, world_size=flush.world_size, step=flush.step, state=state).items():
        ranks.setdefault(names[0], []).append(rank)
    common = {
        "command": "flush",
        "generation": flush.generation,
        "world_size": flush.world_size,
        "step": flush.step,
        "token": token,
    }
    return {node: common | {"ranks": own} for node, own in ranks.items()}


def find_spare(node: str, *, state: MembershipState, connections: Mapping[str, AgentConnection]) -> str | None:
    """Another node that can keep replicas."""
    return next((name for name in connections if name != node and state.nodes[name].preempted_at is None), None)
