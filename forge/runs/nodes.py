"""The nodes of a running run, by the numbers that `--node` takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

RAY_DIGITS = 8
"""A node's name begins with so many digits of its Ray node id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNode:
    """A node on which an agent serves a run."""

    name: str
    agent_pid: int
    is_noticed: bool = False
    """A preemption notice for it is known."""
    preempted_at: float | None = None
    """When it will be removed according to the notice, in seconds since the epoch; None if that is unknown."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until it is removed, 0 if that time has passed; None without a notice or if unknown."""
        return None if self.preempted_at is None else max(0.0, self.preempted_at - time.time())

    def is_on(self, node_id: str) -> bool:
        """Whether it is the node with this Ray node id."""
        return bool(node_id) and self.name.partition("-")[0] == node_id[:RAY_DIGITS]


def nodes_now(events: Iterable[Mapping[str, Any]]) -> list[RunNode]:
    """Return the nodes of a run in the order in which they joined; a node's number is its index."""
    found: dict[str, RunNode] = {}
    for event in events:
        match event["event"]:
            case "RunStarted" | "RunFinished" | "RunStopped" | "RunFailed":
                found.clear()
            case "NodeJoined":
                found[event["node"]] = RunNode(name=event["node"], agent_pid=event["agent_pid"])
            case "NodeLeft":
                found.pop(event["node"], None)
            case "PreemptionNoticeReceived" if event["node"] in found and event.get("is_certain", True):
                left_s = event["seconds_left"]
                at = None if left_s is None else event["time"] + left_s
                found[event["node"]] = replace(found[event["node"]], is_noticed=True, preempted_at=at)
    return list(found.values())
