"""Build the commands that start a generation or flush replicas to storage, and the launch spec of a worker.

Pure functions of a decision, the membership state and the connected agents; they return one message per agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from forge.elastic.agent_connections import AgentConnection
from forge.elastic.rpc import Message, pack, unpack
from forge.elastic.states import FlushToStorage, MembershipState, StartGeneration
from forge.plan.checkpoint_interval import CheckpointRisk

LOOPBACK = "lo"
"""The network interface of ranks that are all on one node."""


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
    has_listener: bool = False


def start_commands(
    start: StartGeneration,
    *,
    state: MembershipState,
    connections: Mapping[str, AgentConnection],
    laps: Mapping[str, float],
    checkpoint_risk: CheckpointRisk | None = None,
) -> dict[str, Message]:
    """Return for each node the command that starts its ranks of a generation.

    Args:
        checkpoint_risk: with `checkpoint.every: auto`.
        laps: seconds of each part of the membership change so far.
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
        "source": _source(start, state=state, connections=connections),
        "laps": dict(laps),
        "checkpoint_risk": None if checkpoint_risk is None else asdict(checkpoint_risk),
        "is_stopping": state.is_stopping,
    }
    commands = {}
    for number, node in enumerate(nodes):
        peer = (
            nodes[(number + 1) % len(nodes)]
            if len(nodes) > 1
            else find_spare(node, state=state, connections=connections)
        )
        commands[node] = common | {
            "ranks": ranks[node],
            "num_on_host": num_on_host[connections[node].host],
            "peer": list(connections[peer].endpoint) if peer is not None else None,
        }
    return commands


def flush_commands(flush: FlushToStorage, *, state: MembershipState, token: str) -> dict[str, Message]:
    """By node, the command to write its shards of a checkpoint from memory."""
    ranks: dict[str, list[int]] = {}
    for rank, names in _holders(
        flush.generation, world_size=flush.world_size, step=flush.step, state=state
    ).items():
        ranks.setdefault(names[0], []).append(rank)
    common = {
        "command": "flush",
        "generation": flush.generation,
        "world_size": flush.world_size,
        "step": flush.step,
        "token": token,
    }
    return {node: common | {"ranks": own} for node, own in ranks.items()}


def source_shards(command: Message) -> list[Message]:
    """The snapshots that a start command continues from: generation, rank, endpoint."""
    if command["source"] is None:
        return []
    generation, endpoints = command["source"]
    return [
        {"generation": generation, "rank": rank, "endpoint": endpoint}
        for rank, endpoint in enumerate(unpack(endpoints))
    ]


def _source(
    start: StartGeneration, *, state: MembershipState, connections: Mapping[str, AgentConnection]
) -> list[Any] | None:
    """Return the generation to continue from, and one endpoint per rank; agents prefer their own replicas.

    The endpoints are compressed, because every agent receives all of them.
    """
    if start.source is None:
        return None
    generation, world_size = start.source
    where = _holders(generation, world_size=world_size, step=start.step, state=state)
    return [generation, pack([list(connections[where[rank][0]].endpoint) for rank in range(world_size)])]


def _holders(generation: int, *, world_size: int, step: int, state: MembershipState) -> dict[int, list[str]]:
    """Return the nodes that hold each rank's snapshot of a step."""
    found: dict[int, list[str]] = {rank: [] for rank in range(world_size)}
    wanted = (generation, world_size, step)
    for name, node in state.nodes.items():
        for held in node.replicas:
            if (held.generation, held.world_size, held.step) == wanted:
                found[held.rank].append(name)
    return found


def find_spare(node: str, *, state: MembershipState, connections: Mapping[str, AgentConnection]) -> str | None:
    """Another node that can keep replicas."""
    return next((name for name in connections if name != node and state.nodes[name].preempted_at is None), None)
