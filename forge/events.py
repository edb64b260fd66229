"""What can happen to a run, typed.

Every event is one line of `events.jsonl`, every step one line of `metrics.jsonl`; the screen, the
report and W&B are made of these two files and of nothing else. An event says what happened, never how
it looks. It is long because it is the list of all that can happen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The run began, or began again from a checkpoint."""

    run_id: str
    total_steps: int
    resumed_from_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Something slow before the first step has come further; for the screen only."""

    what: str
    done: float
    """0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined:
    """A machine stands ready: its agent is there and its warm process has imported everything."""

    node: str
    """Ray's id of the node."""
    host: str
    num_slots: int
    """How many ranks of this run it has room for."""
    agent_pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLeft:
    """A machine is no longer part of the run."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionNoticeReceived:
    """A machine will be taken away: a preemption that was announced; or it is at risk of that."""

    node: str
    source: str
    """Who said so: `aws`, `gcp`, `azure`, `kubernetes`, `ray`."""
    seconds_left: float | None
    """None where no time was given."""
    is_certain: bool = True
    """False for a mere recommendation to be somewhere else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipChangeStarted:
    """A generation ends, so that another can take its place."""

    generation: int
    """The one that ends."""
    cause: str
    """`notice`, `loss`, `hang`, `growth`, `yield`, `failure`."""
    reason: str
    """For people: which machine or rank, and what about it."""
    seconds_since_cause: float
    """How long ago it happened, where that is known: a hang is seen seconds after it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHung:
    """No rank made progress any more; the stacks of all ranks are in their logs."""

    generation: int
    rank: int
    """The one behind the others."""
    node: str
    silent_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingForMachines:
    """The run waits, its state safe, until it has its smallest number of workers."""

    have: int
    need: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStarting:
    """The ranks of a new membership are being started."""

    generation: int
    world_size: int
    from_step: int
    source: str
    """Where its state comes from: `memory`, `storage` (or nothing yet, at step 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLocation:
    """Where one rank runs."""

    rank: int
    node: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStarted:
    """The ranks of one membership stand ready."""

    generation: int
    world_size: int
    device: str
    peak_flops: float
    """Of all ranks together, in the job's precision; nan if unknown."""
    peak_source: str
    seconds: Mapping[str, float]
    """What forming was made of: decide, stop, fork, rendezvous, build, load, ..."""
    ranks: tuple[RankLocation, ...] = ()
    """Empty where the engine does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotIntervalChanged:
    """How often the state is copied to memory outside the ranks, chosen from what a copy costs."""

    every: int
    """Steps."""
    seconds: float
    """What one costs the training."""
    share: float
    """Of the time of the steps it is taken in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorStarted:
    """The process that decides is there."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorRestarted:
    """The process that decides died and was started again; the ranks went on meanwhile."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CostUpdated:
    """What the run has cost so far, where its machines tell their price."""

    usd: float
    """In all, over every time that it was carried on."""
    usd_per_hour: float
    """All its machines together, now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The held-out loss was measured."""

    step: int
    loss: float
    perplexity: float
    num_tokens: int
    weights: str
    """`current` or `ema`."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A durable checkpoint is complete."""

    step: int
    folder: str
    """Or the URL."""
    size_bytes: int
    seconds: float
    """From the end of its step; training went on meanwhile."""
    stall_s: float
    """How long training stood still for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed:
    """A checkpoint could not be written; training goes on, the one before stays the newest."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSkipped:
    """A checkpoint that does not verify was passed over while looking for the newest."""

    folder: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRepeated:
    """A step that was recorded before its result was lost; `metrics.jsonl` keeps the first record."""

    step: int
    loss: float
    step_s: float
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingDegraded:
    """W&B could not be reached; the run goes on and records offline."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGenerated:
    """Text from the model as it now is."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSuggested:
    """A search has chosen the values of its next trial."""

    trial: int
    """Counted from 1."""
    values: Mapping[str, Any]
    """By their dotted paths in the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted:
    """A trial has made its first step, or the first after it was carried on."""

    trial: int
    total_steps: int
    seconds: float
    """From the decision to run it to the end of that step."""
    is_warm: bool
    """Whether its ranks were forked from a process that an earlier trial had left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReported:
    """A trial was judged."""

    trial: int
    step: int
    value: float
    """Of the search's metric."""
    metrics: Mapping[str, float | int | None]
    """The whole line of its `metrics.jsonl`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialExploited:
    """A trial goes on from a copy of another one's state, with other values."""

    trial: int
    donor: int
    step: int
    """Of that state."""
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationRoundCompleted:
    """Every trial of a population has been judged at a step; those that changed were told of before."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded:
    """A trial is over."""

    trial: int
    status: str
    """`finished`; `stopped`, given up by the scheduler; `diverged`, its loss is no number; `failed`."""
    step: int
    value: float | None
    """The last one that was reported."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStopped:
    """The run ended before its last step because it was asked to, or would have cost too much."""

    step: int
    reason: str = ""
    """Why forge itself has stopped it; empty if somebody asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """The run reached its last step."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    """The run ended with an error."""

    error: str
    """The class's name in `forge.errors`."""
    message: str


Event = (
    RunStarted
    | Progressed
    | NodeJoined
    | NodeLeft
    | PreemptionNoticeReceived
    | MembershipChangeStarted
    | RankHung
    | WaitingForMachines
    | GenerationStarting
    | GenerationStarted
    | SnapshotIntervalChanged
    | SupervisorStarted
    | SupervisorRestarted
    | CostUpdated
    | Evaluated
    | CheckpointSaved
    | CheckpointFailed
    | CheckpointSkipped
    | StepRepeated
    | TrackingDegraded
    | SampleGenerated
    | TrialSuggested
    | TrialStarted
    | TrialReported
    | TrialExploited
    | PopulationRoundCompleted
    | TrialEnded
    | RunStopped
    | RunFinished
    | RunFailed
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step, as one line of `metrics.jsonl`."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    """Predicted tokens since step 1, this step included."""
    tokens_per_s: float
    mfu: float
    """0 to 1; nan if the peak is unknown."""
    step_s: float
    peak_memory_gib: float
    """Of the rank with the most: GPU memory on CUDA, resident memory on CPU."""
    world_size: int
    held_out_loss: float | None = None
    """Where this step measured it."""

    def as_record(self) -> dict[str, float | int | None]:
        """Under the keys that W&B and `metrics.jsonl` share; what is not finite becomes null."""
        record: dict[str, float | int | None] = {
            "step": self.step,
            "train/loss": self.loss,
            "train/learning_rate": self.learning_rate,
            "train/grad_norm": self.grad_norm,
            "train/tokens": self.num_tokens,
            "speed/tokens_per_s": self.tokens_per_s,
            "speed/mfu": self.mfu,
            "speed/step_s": self.step_s,
            "memory/peak_gib": self.peak_memory_gib,
            "elastic/world_size": self.world_size,
        }
        if self.held_out_loss is not None:
            record["eval/loss"] = self.held_out_loss
            record["eval/perplexity"] = perplexity(self.held_out_loss)
        return {key: _finite(value) for key, value in record.items()}


class Reporter(Protocol):
    """Where a rank's news go. Rank 0 reports; the others are given one that is silent."""

    def event(self, event: Event) -> None:
        """Pass on an event; does not wait for it to be written."""

    def step(self, metrics: StepMetrics) -> None:
        """Pass on a step; does not wait for it to be written."""

    def resend(self, metrics: StepMetrics) -> None:
        """Pass on a step of before, in case that it was not written."""

    def should_stop(self) -> bool:
        """Whether the run was asked to checkpoint and stop."""

    def should_drain(self) -> bool:
        """Whether this generation is to end, for another to go on from its snapshot."""


def perplexity(loss: float) -> float:
    """`exp(loss)`, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def event_to_record(event: Event) -> dict[str, Any]:
    """`{"event": "CheckpointSaved", "step": 100, ...}`; what is not finite becomes null."""
    body = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {"event": type(event).__name__} | {key: _finite(value) for key, value in body.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, RankLocation):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value
