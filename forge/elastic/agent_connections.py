"""The agents that are connected to the supervisor, and their heartbeat interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from forge.elastic.agent_channel import AgentChannel
from forge.elastic.messages import SharedMessage
from forge.elastic.rpc import Endpoint, Message

_HEARTBEAT_S = 0.25
# Heartbeats of all agents together: a third of a core, their connections included.
_MAX_HEARTBEATS_PER_S = 5_000
# The interval is changed when it is wrong by this share, because every change is sent to all agents.
_MAX_INTERVAL_ERROR = 0.25
# A node is lost after this silence or, in a large cluster, after this number of heartbeat intervals.
_MAX_SILENCE_S = 3.0
_MAX_SILENT_HEARTBEATS = 5


@dataclass(slots=True, kw_only=True)
class AgentConnection:
    """A connected agent."""

    node: str
    host: str
    endpoint: Endpoint
    """Of its replica store."""
    rendezvous_port: int
    """Where ranks meet if rank 0 runs on its node."""
    agent_pid: int
    send: Callable[[Message], None]
    close: Callable[[], None]
    heard_at: float
    usd_per_hour: float | None = None
    saving_usd_per_hour: float = 0.0
    """How much less than on demand its machine costs; 0 for an on-demand machine."""
    mtbf_s: float | None = None
    """Mean time until its machine is lost, as far as it is known."""
    number: int | None = None
    """Of its endpoint, in commands (`SourceWriter`); None: it has none yet."""
    num_endpoints_sent: int = 0
    """It has been sent the endpoints with smaller numbers than this."""


class AgentConnections(Mapping[str, AgentConnection]):
    """Connections by node name. The heartbeat interval grows with their number."""

    def __init__(self) -> None:
        self._by_node: dict[str, AgentConnection] = {}
        self._heartbeat_s = _HEARTBEAT_S

    def __getitem__(self, node: str) -> AgentConnection:
        return self._by_node[node]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_node)

    def __len__(self) -> int:
        return len(self._by_node)

    def add(self, connection: AgentConnection) -> None:
        """Register a connection; close the node's former one."""
        former = self._by_node.pop(connection.node, None)
        if former is not None:
            former.close()
        self._by_node[connection.node] = connection
        self._adapt_heartbeat()
        connection.send({"command": "set_heartbeat", "heartbeat_s": self._heartbeat_s})

    def remove(self, connection: AgentConnection) -> bool:
        """Remove a connection. Returns: whether it was the node's current one."""
        if self._by_node.get(connection.node) is not connection:
            return False
        del self._by_node[connection.node]
        self._adapt_heartbeat()
        return True

    def send(self, node: str, message: Message) -> None:
        """Send to one agent, if it is connected."""
        if node in self._by_node:
            self._by_node[node].send(message)

    def broadcast(self, message: Message) -> None:
        """Send to all agents."""
        shared = SharedMessage(message)
        for connection in self._by_node.values():
            connection.send(shared)

    def excuse_silence(self, seconds: float) -> None:
        """Extend every agent's silence limit by the time during which this process did not read messages."""
        for connection in self._by_node.values():
            connection.heard_at += seconds

    def silent(self, now: float) -> list[AgentConnection]:
        """Return the agents that have sent nothing for longer than the limit."""
        limit_s = max(_MAX_SILENCE_S, _MAX_SILENT_HEARTBEATS * self._heartbeat_s)
        return [connection for connection in self._by_node.values() if now - connection.heard_at > limit_s]

    def _adapt_heartbeat(self) -> None:
        heartbeat_s = max(_HEARTBEAT_S, len(self._by_node) / _MAX_HEARTBEATS_PER_S)
        if abs(heartbeat_s - self._heartbeat_s) > _MAX_INTERVAL_ERROR * self._heartbeat_s:
            self._heartbeat_s = heartbeat_s
            self.broadcast({"command": "set_heartbeat", "heartbeat_s": heartbeat_s})


def accept_agent(registration: Message, channel: AgentChannel, *, now: float) -> AgentConnection:
    """Build the connection of an agent that has registered."""
    return AgentConnection(
        node=registration["node"],
        host=registration["host"],
        endpoint=tuple(registration["endpoint"]),
        rendezvous_port=registration["rendezvous_port"],
        agent_pid=registration["pid"],
        send=channel.send,
        close=channel.close,
        heard_at=now,
        usd_per_hour=registration["usd_per_hour"],
        saving_usd_per_hour=registration.get("saving_usd_per_hour", 0.0),
        mtbf_s=registration.get("mtbf_s"),
    )
