"""What agents are told when a generation starts, or a checkpoint is made without ranks; and what ranks are told.

Pure functions: in go the decision, the state it was made in, and where the agents are; out comes a message for
each agent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forge.elastic.rpc import Endpoint, Message, pack, unpack
from forge.elastic.states import FlushToStorage, MembershipState, StartGeneration


@dataclass(slots=True, kw_only=True)
class AgentConnection:
    """An agent that is connected."""

    node: str
    host: str
    endpoint: Endpoint
    """Of its store."""
    rendezvous_port: int
    """Where the ranks meet if the first of them is on its machine."""
    agent_pid: int
    send: Callable[[Message], None]
    close: Callable[[], None]
    heard_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a rank is told before it starts; JSON. Descriptors are numbers into those that come with it."""

    generation: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: str
    num_threads: int
    """For arithmetic on CPU."""
    checkpoints: str
    log: str
    host: str
    """Of the first rank's machine, where all meet."""
    port: int
    interface: str | None
    """Of the network that gloo uses."""
    step: int
    parts: list[dict[str, Any]]
    """Of the snapshots to go on from: generation, rank, and `fd` or `endpoint`; empty: from storage."""
    findings: dict[str, Any] | None
    laps: dict[str, float]
    asked_at: float
    """By the machine's monotonic clock."""
    secret: str
    has_listener: bool = False


def start_commands(
    start: StartGeneration,
    state: MembershipState,
    connections: Mapping[str, AgentConnection],
    *,
    findings: Message | None,
    laps: Mapping[str, float],
) -> dict[str, Message]:
    """By node, the order to start its ranks of a generation.

    Args:
        findings: what an earlier generation has found out; see `forge.train.worker.Findings`.
        laps: seconds of the parts of the change so far.
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
        "source": _source(start, state, connections),
        "findings": findings,
        "laps": dict(laps),
        "is_stopping": state.is_stopping,
    }
    orders = {}
    for number, node in enumerate(nodes):
        peer = nodes[(number + 1) % len(nodes)] if len(nodes) > 1 else find_spare(node, state, connections)
        orders[node] = common | {
            "ranks": ranks[node],
            "num_on_host": num_on_host[connections[node].host],
            "peer": list(connections[peer].endpoint) if peer is not None else None,
        }
    return orders


def flush_commands(persist: FlushToStorage, state: MembershipState, *, token: str) -> dict[str, Message]:
    """By node, the order to write parts of a checkpoint out of its memory."""
    ranks: dict[str, list[int]] = {}
    for rank, names in _holders(persist.generation, persist.world_size, persist.step, state).items():
        ranks.setdefault(names[0], []).append(rank)
    common = {
        "command": "flush",
        "generation": persist.generation,
        "world_size": persist.world_size,
        "step": persist.step,
        "token": token,
    }
    return {node: common | {"ranks": own} for node, own in ranks.items()}


def source_shards(order: Message) -> list[Message]:
    """The snapshots to go on from, as an order to start tells of them: generation, rank, endpoint."""
    if order["source"] is None:
        return []
    generation, endpoints = order["source"]
    return [
        {"generation": generation, "rank": rank, "endpoint": endpoint}
        for rank, endpoint in enumerate(unpack(endpoints))
    ]


def _source(
    start: StartGeneration, state: MembershipState, connections: Mapping[str, AgentConnection]
) -> list[Any] | None:
    """A machine for each part of the step to go on from; agents prefer what they have themselves.

    Packed, as every machine is told all of it.
    """
    if start.source is None:
        return None
    generation, world_size = start.source
    where = _holders(generation, world_size, start.step, state)
    return [generation, pack([list(connections[where[rank][0]].endpoint) for rank in range(world_size)])]


def _holders(generation: int, world_size: int, step: int, state: MembershipState) -> dict[int, list[str]]:
    """The machines that hold each rank's snapshot of a step."""
    found: dict[int, list[str]] = {rank: [] for rank in range(world_size)}
    wanted = (generation, world_size, step)
    for name, node in state.nodes.items():
        for held in node.replicas:
            if (held.generation, held.world_size, held.step) == wanted:
                found[held.rank].append(name)
    return found


def find_spare(node: str, state: MembershipState, connections: Mapping[str, AgentConnection]) -> str | None:
    """A machine without ranks that can keep a copy all the same."""
    return next((name for name in connections if name != node and state.nodes[name].preempted_at is None), None)
