"""The snapshots that a generation continues from, in start commands: which node has each rank's.

A list of all endpoints in each of 10,000 commands would be 800 MB. So nodes are numbered, and an agent is sent the
endpoints that it has not had yet; which node has which snapshot is a list of numbers, most of them the one before
plus one, which compresses to a few hundred bytes. Where many nodes have the same snapshot, as with shard groups,
there are several lists, and each node reads by one of them, so that not all read from one node. What an agent has
never had is sent in the background while ranks train (`endpoints` commands), so that the first membership change
need not send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from forge.elastic.agent_connections import AgentConnection
from forge.elastic.messages import SharedMessage, pack, unpack
from forge.elastic.rpc import Endpoint, Message
from forge.elastic.states import MembershipState, StartGeneration

_MIN_ANNOUNCED = 64
"""An agent that lacks fewer endpoints gets them with its next start command."""
_ANNOUNCED_BYTES = 2 * 2**20
"""Of `endpoints` commands at a time. A list of 10,000 endpoints has 80 KB: at ten ticks per second, all agents have
it after 40 s, and it takes a few hundredths of a core and 20 MB/s until then.
"""


class SourceWriter:
    """The supervisor's side: numbers the nodes, and remembers in their connections which endpoints they have."""

    def __init__(self) -> None:
        self._nodes: list[tuple[str, Endpoint]] = []
        """By number, also of nodes that are gone."""
        self._generation = 0
        """Whose nodes are being sent `endpoints` commands."""
        self._lacking: list[str] = []
        """Its nodes that will be sent one."""
        self._announcements: dict[int, SharedMessage] = {}
        """By the first number that they have; `_num_announced` is the last one plus one."""
        self._num_announced = 0

    def announcements(
        self, state: MembershipState, *, connections: Mapping[str, AgentConnection]
    ) -> Mapping[str, Message]:
        """Return some of the `endpoints` commands that agents need, by node; they must be sent."""
        if state.generation != self._generation:
            self._begin_announcements(state, connections)
        found: dict[str, Message] = {}
        left = _ANNOUNCED_BYTES
        while self._lacking and left > 0:
            node = self._lacking.pop()
            if node not in connections:
                continue
            connection = connections[node]
            first = connection.num_endpoints_sent
            if first not in self._announcements:
                packed = self._pack_endpoints(first, connections)
                self._announcements[first] = SharedMessage(
                    {"command": "endpoints", "first": first, "endpoints": packed}
                )
            found[node] = self._announcements[first]
            connection.num_endpoints_sent = self._num_announced
            left -= len(found[node]["endpoints"])
        return found

    def _begin_announcements(self, state: MembershipState, connections: Mapping[str, AgentConnection]) -> None:
        nodes = [node for node in dict.fromkeys(state.assignment) if node in connections]
        for node in nodes:
            self._number(connections[node])
        self._generation, self._num_announced, self._announcements = state.generation, len(self._nodes), {}
        self._lacking = [
            node for node in nodes if self._num_announced - connections[node].num_endpoints_sent >= _MIN_ANNOUNCED
        ]

    def sources(
        self, start: StartGeneration, *, state: MembershipState, connections: Mapping[str, AgentConnection]
    ) -> Mapping[str, Message | None]:
        """Return the field `source` of each node's start command, which must be sent; None: from storage."""
        nodes = dict.fromkeys(start.assignment)
        if start.source is None:
            return dict.fromkeys(nodes)
        generation, world_size = start.source
        where = holders(generation, world_size=world_size, step=start.step, state=state)
        numbers = [sorted(self._number(connections[name]) for name in where[rank]) for rank in range(world_size)]
        num_lists = max(1, max(len(held) for held in numbers) // 2)  # one, if there is but the usual replica
        lists = [_differences([held[i % len(held)] for held in numbers]) for i in range(num_lists)]
        by_known: dict[int, Message] = {}
        found: dict[str, Message | None] = {}
        for node in nodes:
            known = connections[node].num_endpoints_sent
            if known not in by_known:
                by_known[known] = {
                    "generation": generation,
                    "lists": lists,
                    "first": known,
                    "endpoints": self._pack_endpoints(known, connections),
                }
            connections[node].num_endpoints_sent = len(self._nodes)
            found[node] = by_known[known]
        return found

    def _pack_endpoints(self, first: int, connections: Mapping[str, AgentConnection]) -> str:
        """Return the endpoints of connected nodes from a number on."""
        return pack(
            [
                [number, *endpoint]
                for number, (name, endpoint) in enumerate(self._nodes[first:], first)
                if name in connections and connections[name].number == number
            ]
        )

    def _number(self, connection: AgentConnection) -> int:
        if connection.number is None:
            connection.number = len(self._nodes)
            self._nodes.append((connection.node, connection.endpoint))
        return connection.number


class SourceReader:
    """The agent's side: keeps the endpoints of earlier commands."""

    def __init__(self) -> None:
        self._endpoints: dict[int, list[object]] = {}

    def learn(self, command: Message) -> None:
        """Keep the endpoints of an `endpoints` command, or of the source in a start command."""
        if command["first"] == 0:  # a new connection: its supervisor may have numbered the nodes differently
            self._endpoints = {}
        self._endpoints.update((number, endpoint) for number, *endpoint in unpack(command["endpoints"]))

    def shards(self, command: Message) -> list[Message]:
        """The snapshots that a start command continues from: generation, rank, endpoint.

        Every start command must be passed here, and every `endpoints` command to `learn`, in the order in which
        they were sent.
        """
        source = command["source"]
        if source is None:
            return []
        self.learn(source)
        lists = source["lists"]
        return [
            {"generation": source["generation"], "rank": rank, "endpoint": self._endpoints[number]}
            for rank, number in enumerate(accumulate(unpack(lists[command["number"] % len(lists)])))
        ]


def _differences(numbers: list[int]) -> str:
    return pack([after - before for before, after in zip([0, *numbers], numbers, strict=False)])


def holders(generation: int, *, world_size: int, step: int, state: MembershipState) -> dict[int, list[str]]:
    """Return the nodes that hold each rank's snapshot of a step."""
    found: dict[int, list[str]] = {rank: [] for rank in range(world_size)}
    wanted = (generation, world_size, step)
    for name, node in state.nodes.items():
        for held in node.replicas:
            if (held.generation, held.world_size, held.step) == wanted and held.rank in found:
                found[held.rank].append(name)
    return found
