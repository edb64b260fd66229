"""The snapshots that a generation continues from, in start commands: which node has each rank's.

A list of all endpoints in each of 10,000 commands would be 800 MB. So nodes are numbered, and an agent is sent the
endpoints that it has not had yet; which node has which rank's snapshot is a list of numbers, most of them the one
before plus one, which compresses to a few hundred bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from forge.elastic.agent_connections import AgentConnection
from forge.elastic.rpc import Endpoint, Message, pack, unpack
from forge.elastic.states import MembershipState, StartGeneration


class SourceWriter:
    """The supervisor's side: numbers the nodes, and remembers in their connections which endpoints they have."""

    def __init__(self) -> None:
        self._nodes: list[tuple[str, Endpoint]] = []
        """By number, also of nodes that are gone."""

    def sources(
        self, start: StartGeneration, *, state: MembershipState, connections: Mapping[str, AgentConnection]
    ) -> Mapping[str, Message | None]:
        """Return the field `source` of each node's start command, which must be sent; None: from storage."""
        nodes = dict.fromkeys(start.assignment)
        if start.source is None:
            return dict.fromkeys(nodes)
        generation, world_size = start.source
        where = holders(generation, world_size=world_size, step=start.step, state=state)
        numbers = [min(self._number(connections[name]) for name in where[rank]) for rank in range(world_size)]
        steps = pack([after - before for before, after in zip([0, *numbers], numbers, strict=False)])
        by_known: dict[int, Message] = {}
        found: dict[str, Message | None] = {}
        for node in nodes:
            known = connections[node].num_endpoints_sent
            if known not in by_known:
                by_known[known] = {
                    "generation": generation,
                    "numbers": steps,
                    "first": known,
                    "endpoints": pack(
                        [
                            [number, *endpoint]
                            for number, (name, endpoint) in enumerate(self._nodes[known:], known)
                            if name in connections and connections[name].number == number
                        ]
                    ),
                }
            connections[node].num_endpoints_sent = len(self._nodes)
            found[node] = by_known[known]
        return found

    def _number(self, connection: AgentConnection) -> int:
        if connection.number is None:
            connection.number = len(self._nodes)
            self._nodes.append((connection.node, connection.endpoint))
        return connection.number


class SourceReader:
    """The agent's side: keeps the endpoints of earlier commands."""

    def __init__(self) -> None:
        self._endpoints: dict[int, list[object]] = {}

    def shards(self, command: Message) -> list[Message]:
        """The snapshots that a start command continues from: generation, rank, endpoint.

        Every start command must be passed here, in the order in which they were sent.
        """
        source = command["source"]
        if source is None:
            return []
        if source["first"] == 0:  # a new connection: its supervisor may have numbered the nodes differently
            self._endpoints = {}
        self._endpoints.update((number, endpoint) for number, *endpoint in unpack(source["endpoints"]))
        return [
            {"generation": source["generation"], "rank": rank, "endpoint": self._endpoints[number]}
            for rank, number in enumerate(accumulate(unpack(source["numbers"])))
        ]


def holders(generation: int, *, world_size: int, step: int, state: MembershipState) -> dict[int, list[str]]:
    """Return the nodes that hold each rank's snapshot of a step."""
    found: dict[int, list[str]] = {rank: [] for rank in range(world_size)}
    wanted = (generation, world_size, step)
    for name, node in state.nodes.items():
        for held in node.replicas:
            if (held.generation, held.world_size, held.step) == wanted:
                found[held.rank].append(name)
    return found
