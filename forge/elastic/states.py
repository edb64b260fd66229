"""The state of a run's membership, the events that change it, and the actions that result.

Plain data, so that a history can be recorded and replayed; `forge.elastic.membership` makes the decisions. Times
are seconds of one clock. A node's name consists of Ray's node id and the number of its agent on that node.

The module is long because it lists every event and action of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from forge.elastic.sharded import ShardedSet


class Phase(StrEnum):
    """Phase of a run; `forge.elastic.membership` shows the state chart."""

    WAITING = "waiting"
    STARTING = "starting"
    TRAINING = "training"
    DRAINING = "draining"
    STOPPING = "stopping"
    DONE = "done"


class ReplicaLocation(NamedTuple):
    """One complete snapshot of one step, in a node's memory.

    A tuple, because it is built and hashed several times faster than a dataclass: the reports on one membership
    change of 10,000 nodes name 40,000 of them.
    """

    generation: int
    rank: int
    """That took it; with shard groups, the number of the piece (`forge.train.snapshot_pieces`)."""
    world_size: int
    """Likewise: how many snapshots a step has."""
    step: int


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ReplicatedStep:
    """A step of which every rank's snapshot is complete in some node's memory."""

    step: int
    generation: int
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberNode:
    """A node of this run."""

    num_slots: int
    num_guaranteed: int = 0
    """Slots that belong to the run's minimum and are never released."""
    is_ready: bool = False
    """Its fork server has imported everything."""
    num_failed_starts: int = 0
    """Fork servers in a row that ended before they were ready."""
    start_failure: str = ""
    """How the last of them ended."""
    preempted_at: float | None = None
    """When it will be taken away, if notice was given."""
    quarantined_until: tuple[float, ...] = ()
    """One entry per slot whose rank hung."""
    replicas: frozenset[ReplicaLocation] = frozenset()

    def usable_slots(self, now: float, *, margin_s: float, respect_quarantine: bool = True) -> int:
        """How many ranks of a new generation fit on this node.

        Args:
            margin_s: a node whose preemption is no further away takes none.
            respect_quarantine: leave out slots whose rank hung a short time ago.
        """
        if not self.is_ready or (self.preempted_at is not None and self.preempted_at - now <= margin_s):
            return 0
        if not self.quarantined_until or not respect_quarantine:
            return self.num_slots
        return max(0, self.num_slots - sum(until > now for until in self.quarantined_until))


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipState:
    """Everything that decisions depend on."""

    min_workers: int
    max_workers: int
    num_spare: Mapping[int, int] = field(default_factory=dict)
    """Usable slots → how many of them get no rank, by the plan; 0 where left out."""
    group_sizes: Mapping[int, int] = field(default_factory=dict)
    """World size → ranks in a group that should be on one node, as of hpZ or those that share a sequence; 1 where
    left out."""
    num_shard_groups: Mapping[int, int] = field(default_factory=dict)
    """World size → groups of ranks that each hold the whole state; 1 where left out."""
    phase: Phase = Phase.WAITING
    generation: int = 0
    """The newest generation; the next one has the next number."""
    former_generation: int = 0
    """The last generation before this supervisor started; 0 if there was none."""
    assignment: tuple[str, ...] = ()
    """Rank → node, of the generation that is starting, training, draining or stopping."""
    nodes: Mapping[str, MemberNode] = field(default_factory=dict)
    stopping_nodes: ShardedSet[str] = field(default_factory=ShardedSet)
    """Nodes that were ordered to stop their ranks and have not confirmed. No generation starts before they do."""
    ended_ranks: ShardedSet[int] = field(default_factory=ShardedSet)
    """Ranks of the generation that have ended by themselves."""
    done_step: int | None = None
    """The step at which a rank reached the end of the run, or stopped on request."""
    stored_step: int = 0
    """The newest step in durable storage."""
    margin_s: float = 2.0
    """How long a planned change takes, from the request until every rank has drained."""
    grow_at: float | None = None
    """When nodes that have joined are taken in."""
    yield_until: float = 0.0
    """Until then the run claims no more than its minimum."""
    num_failures: int = 0
    """Generations in a row that broke by themselves before their first step."""
    failure: str = ""
    """Why the generation broke before its first step, if it did."""
    break_reason: str = ""
    """Why the generation broke by itself, before or after its first step, if it did."""
    from_step: int = 0
    """The step that the generation continues from."""
    num_fruitless: int = 0
    """Generations in a row that broke by themselves before any step of theirs was kept."""
    has_lost_node: bool = False
    """A node was lost since the generation started, so its end may not be its own fault."""
    flushing: ReplicatedStep | None = None
    """WAITING: the step that nodes write from memory to durable storage."""
    is_stopping: bool = False
    """The run was asked to write a checkpoint and stop."""
    recovery_deadline: float | None = None
    """A restarted supervisor waits until then for all agents of the generation it has found."""
    dropped_before: int = 0
    """Replicas of generations before this one were dropped."""


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
    """Of the ranks that run on it, or ran last."""
    running_ranks: Mapping[int, int] = field(default_factory=dict)
    """Running rank → the world size of its generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReady:
    """A node's fork server is ready, or has died."""

    node: str
    is_ready: bool = True
    reason: str = ""
    """How it died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLost:
    """A node's agent or its network connection is gone."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsChanged:
    """The cluster has given slots on a node, or has taken some back."""

    node: str
    num_slots: int
    num_guaranteed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionNotice:
    """A node will be taken away."""

    node: str
    preempted_at: float
    """The current time if no time was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasHeld:
    """The complete list of replicas in a node's memory."""

    node: str
    replicas: frozenset[ReplicaLocation]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationReady:
    """A generation has completed its first step."""

    generation: int


class EndReason(StrEnum):
    """How a rank ended."""

    DONE = "done"
    DRAINED = "drained"
    """It ended after its step on request; the next generation continues from its snapshot."""
    BROKEN = "broken"
    """It was killed, or its connection to another rank broke: the run continues."""
    FAILED = "failed"
    """An error that a restart would repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnded:
    """A rank has ended."""

    generation: int
    rank: int
    end: EndReason
    step: int = 0
    reason: str = ""
    error: str = "RunError"
    """FAILED: the name of the class in `forge.errors`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStopped:
    """A node has no rank of this generation any more. The ranks that it has killed have no `RankEnded`."""

    node: str
    generation: int
    replicas: frozenset[ReplicaLocation]


@dataclass(frozen=True, slots=True, kw_only=True)
class HangDetected:
    """No rank makes progress, and this rank is behind the others."""

    generation: int
    rank: int
    silent_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted:
    """A durable checkpoint is complete."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """The run was asked to write a checkpoint and stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YieldRequested:
    """Another run is waiting for its minimum number of workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""

    margin_s: float | None = None
    """How long a planned change takes, from measured step times."""


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
    """Start the ranks of a generation."""

    generation: int
    assignment: tuple[str, ...]
    """Rank → node."""
    step: int
    """The step to continue from."""
    source: tuple[int, int] | None
    """(generation, world size) of the snapshots to load; None: load from storage, or initialise at step 0."""
    num_spare: int = 0
    """Usable slots without a rank, by the plan."""
    num_split_groups: int = 0
    """Groups (`group_sizes`) on more than one node."""
    num_shard_groups: int = 1
    """Groups of ranks that each hold the whole state."""
    parts_per_shard: int = 0
    """With shard groups on several nodes: of how many parts of its shard a rank keeps one in memory, as others with
    the same shard have the rest (`forge.train.snapshot_pieces`); 0: each keeps its own, and sends it elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopGeneration:
    """Kill a node's ranks of this and older generations, and have it report its replicas."""

    node: str
    generation: int
    keep_replicas: bool = False
    """The generation continues on other nodes, so this node keeps accepting replicas of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainGeneration:
    """Ask a generation to end after its current step."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropReplicas:
    """Free the replicas of generations before this one."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushToStorage:
    """Write a durable checkpoint from replicas, because no ranks run that could write it."""

    generation: int
    world_size: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitForNodes:
    """Report that the run waits because it has too few slots."""

    have: int
    need: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeMembership:
    """Report that a generation ends, and why."""

    generation: int
    cause: str
    reason: str
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceNode:
    """Ask the cluster for a replacement of a node that will be preempted, and put nothing new on it."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSlots:
    """Return the slots that no rank uses to the cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimSlots:
    """Ask the cluster for as many slots as the job allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRun:
    """The run has reached its end, or was stopped."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailRun:
    """The run cannot continue."""

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
