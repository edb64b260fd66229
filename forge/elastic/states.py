"""What is said about the members of a run: its state, what may happen to it, and what is done about it.

Plain data, so that a history can be written down and replayed; `forge.elastic.membership` decides with it.
Times are seconds of one clock. A node is named by Ray's id and the number of its agent on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """Where a run stands; `forge.elastic.membership` draws it."""

    WAITING = "waiting"
    STARTING = "starting"
    TRAINING = "training"
    DRAINING = "draining"
    STOPPING = "stopping"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLocation:
    """One rank's whole snapshot of one step, in a machine's memory."""

    generation: int
    rank: int
    world_size: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberNode:
    """A machine of this run."""

    num_slots: int
    num_guaranteed: int = 0
    """Of them, those of the smallest number of workers, which are never given back."""
    is_ready: bool = False
    preempted_at: float | None = None
    """When it will be taken away, if notice was given."""
    quarantined_until: tuple[float, ...] = ()
    """One entry for each place whose rank hung."""
    replicas: frozenset[ReplicaLocation] = frozenset()

    def room(self, now: float, *, margin_s: float, benches: bool = True) -> int:
        """How many ranks of a new generation it takes."""
        if not self.is_ready or (self.preempted_at is not None and self.preempted_at - now <= margin_s):
            return 0
        return max(0, self.num_slots - sum(until > now for until in self.quarantined_until) * benches)


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipState:
    """All that decisions are made from."""

    min_workers: int
    max_workers: int
    phase: Phase = Phase.WAITING
    generation: int = 0
    """The newest; the next has the next number."""
    former_generation: int = 0
    """The last one of the run before this supervisor; 0 if there was none."""
    assignment: tuple[str, ...] = ()
    """The node of each rank of the generation that is forming, training, leaving or stopping."""
    nodes: Mapping[str, MemberNode] = field(default_factory=dict)
    stopping_nodes: frozenset[str] = frozenset()
    """Nodes that were told to stop ranks, and have not said yet that they are gone. None starts before."""
    ended_ranks: frozenset[int] = frozenset()
    """Ranks of the generation that have ended by themselves."""
    done_step: int | None = None
    """A rank has reached the end of the run, or stopped as it was asked to."""
    stored_step: int = 0
    """The newest step that is in storage."""
    margin_s: float = 2.0
    """What a planned change needs from being asked for until every rank has left."""
    grow_at: float | None = None
    """When the machines that have joined are taken in."""
    yield_until: float = 0.0
    num_failures: int = 0
    """Generations in a row that broke by themselves before their first step."""
    failure: str = ""
    """Why the generation broke before its first step, if it did."""
    has_lost_node: bool = False
    """A machine was lost since the generation was formed: that it breaks may not be its own fault."""
    flushing: tuple[int, int, int] | None = None
    """WAITING: (step, generation, world size) of the snapshots that are to be made durable."""
    is_stopping: bool = False
    """The run was asked to checkpoint and stop."""
    recovery_deadline: float | None = None
    """A supervisor that was restarted has found a generation, and waits for all of its agents."""
    dropped_before: int = 0
    """Snapshots of generations before this one were let go."""


# --- events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentAttached:
    """An agent has connected, for the first time or again."""

    node: str
    num_slots: int
    num_guaranteed: int = 0
    is_ready: bool = False
    replicas: frozenset[ReplicaLocation] = frozenset()
    generation: int = 0
    """Of the ranks that it has, or had last."""
    running_ranks: Mapping[int, int] = field(default_factory=dict)
    """Its ranks that run: rank → the generation's world size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReady:
    """Its warm process is ready, or has died."""

    node: str
    is_ready: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLost:
    """Its agent or its network is gone."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsChanged:
    """The cluster has given assignment on a node, or has taken them back."""

    node: str
    num_slots: int
    num_guaranteed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionNotice:
    """A machine will be taken away."""

    node: str
    preempted_at: float
    """Now, where no time was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasHeld:
    """What is in a machine's memory now."""

    node: str
    replicas: frozenset[ReplicaLocation]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationReady:
    """The generation has made its first step."""

    generation: int


class EndReason(StrEnum):
    """How a rank ended."""

    DONE = "done"
    DRAINED = "drained"
    BROKEN = "broken"
    """Killed, or a connection to another rank broke: the run goes on."""
    FAILED = "failed"
    """With an error that would come again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnded:
    """A rank is gone."""

    generation: int
    rank: int
    end: EndReason
    step: int = 0
    reason: str = ""
    error: str = "RunError"
    """FAILED: the class's name in `forge.errors`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStopped:
    """A node has no rank of this generation any more."""

    node: str
    generation: int
    replicas: frozenset[ReplicaLocation]


@dataclass(frozen=True, slots=True, kw_only=True)
class HangDetected:
    """No rank makes progress, and this one is behind."""

    generation: int
    rank: int
    silent_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted:
    """A durable checkpoint is complete."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """Somebody asked the run to checkpoint and stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YieldRequested:
    """Another run waits for its smallest number of workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""

    margin_s: float | None = None
    """What a planned change needs, by what was measured."""


Event = (
    AgentAttached
    | NodeReady
    | NodeLost
    | SlotsChanged
    | PreemptionNotice
    | ReplicasHeld
    | GenerationReady
    | RankEnded
    | AgentStopped
    | HangDetected
    | CheckpointCommitted
    | StopRequested
    | YieldRequested
    | Tick
)


# --- actions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StartGeneration:
    """Start a generation's ranks."""

    generation: int
    assignment: tuple[str, ...]
    step: int
    """Where it goes on from."""
    source: tuple[int, int] | None
    """(generation, world size) of the snapshots to load; None: from storage, or from nothing at step 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopGeneration:
    """Kill a generation's ranks at a node, and hear what it holds."""

    node: str
    generation: int
    keep_replicas: bool = False
    """Elsewhere: the node has no part in it, but may have to keep copies of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainGeneration:
    """Ask a generation to end after its step."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropReplicas:
    """Let go of snapshots of generations before this one."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushToStorage:
    """Make a durable checkpoint out of the snapshots of a step, as no ranks are there to do it."""

    generation: int
    world_size: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitForNodes:
    """Say that there are too few machines."""

    have: int
    need: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeMembership:
    """Say that a generation ends, and why."""

    generation: int
    cause: str
    reason: str
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceNode:
    """Ask the cluster for another machine in the place of one that will go, and give it nothing new."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSlots:
    """Give the assignment back to the cluster that no rank is using."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimSlots:
    """Ask the cluster for as many assignment as the job allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRun:
    """The run has reached its end, or was stopped."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailRun:
    """The run cannot go on."""

    error: str
    reason: str


Action = (
    StartGeneration
    | StopGeneration
    | DrainGeneration
    | DropReplicas
    | FlushToStorage
    | WaitForNodes
    | ChangeMembership
    | ReplaceNode
    | ReleaseSlots
    | ClaimSlots
    | FinishRun
    | FailRun
)
Decision = tuple[MembershipState, tuple[Action, ...]]
