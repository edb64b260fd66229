"""Converts the reports of agents to membership events; pure functions."""

from __future__ import annotations

from forge.elastic.replicas.store import locations_from_record
from forge.elastic.rpc import Message
from forge.elastic.states import (
    AgentAttached,
    AgentStopped,
    CheckpointCommitted,
    EndReason,
    Event,
    NodeReady,
    RankEnded,
    ReplicasHeld,
)


def attached_from(registration: Message, *, slots: tuple[int, int] | None) -> AgentAttached:
    """The event of an agent's registration.

    Args:
        slots: slots and guaranteed slots as the cluster knows them; None: as the agent reports them.
    """
    num_slots, num_guaranteed = slots or (registration["num_slots"], registration["num_guaranteed"])
    return AgentAttached(
        node=registration["node"],
        num_slots=num_slots,
        num_guaranteed=num_guaranteed,
        is_ready=registration["is_ready"],
        replicas=locations_from_record(registration["replicas"]),
        generation=registration["generation"],
        running_ranks={int(rank): world_size for rank, world_size in registration["running_ranks"].items()},
    )


def event_from(report: Message, *, node: str) -> Event | None:
    """The event of a report; None if membership does not depend on it."""
    match report["report"]:
        case "heartbeat" if "replicas" in report:
            return ReplicasHeld(node=node, replicas=locations_from_record(report["replicas"]))
        case "ready":
            return NodeReady(node=node, is_ready=report["is_ready"], reason=report.get("reason", ""))
        case "ended":
            return RankEnded(
                generation=report["generation"],
                rank=report["rank"],
                end=EndReason(report["end"]),
                step=report["step"],
                reason=report["reason"],
                error=report["error"] or "RunError",
            )
        case "stopped":
            replicas = locations_from_record(report["replicas"])
            return AgentStopped(node=node, generation=report["generation"], replicas=replicas)
        case "checkpoint_committed":
            return CheckpointCommitted(step=report["step"])
    return None


def failure_cause(reason: str) -> str:
    """Return a reason without its paths and numbers, which differ among ranks and generations with one cause."""
    return " ".join(word for word in reason.split() if not any(char.isdigit() or char in "/\\" for char in word))
