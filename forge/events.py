"""Typed events of a run, grouped in the order of a run: start, nodes, generations, state, tracking, search, end.

Each event becomes one line of `events.jsonl`, each step one line of `metrics.jsonl`. The screen, the report and
W&B read only these two files. An event says what happened, never how to display it. The module is long because
it lists every event.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# Start of a run and its supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The run started, or resumed from a checkpoint."""

    run_id: str
    total_steps: int
    resumed_from_step: int
    startup_s: float = 0.0
    """From the start of the driver until this event, in seconds: mostly the start of Ray."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentRecorded:
    """Versions where the driver runs, recorded whenever a run starts or is resumed."""

    python: str
    platform: str
    """Operating system and processor: `Linux-6.1-x86_64-with-glibc2.36`."""
    packages: Mapping[str, str]
    """Version of each package that the result depends on, by its name on PyPI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthChanged:
    """The run was resumed with another length; its learning rate follows the new one from a step on."""

    from_step: int
    """The first step whose learning rate follows the new length."""
    before: str
    """The length until then, as in the job: `total_steps: 1000`."""
    total_steps_before: int
    total_steps: int
    learning_rate_before: float
    """Of the step before; nan if it is step 0."""
    learning_rate: float
    """Of `from_step`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternRead:
    """What one entry of `data.files` gave; the paths of what was skipped are in `plan.json`."""

    pattern: str
    num_files: int
    kinds: Mapping[str, int]
    """Number of files by kind: `JSON lines, gzip`."""
    skipped: Mapping[str, int]
    """Number of paths that were not read, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusRead:
    """The corpus that the run is trained on."""

    num_documents: int
    num_train_tokens: int
    num_held_out_tokens: int
    patterns: tuple[PatternRead, ...]
    """At most 100."""
    warnings: tuple[str, ...]
    """What was asked for and cannot be had; of the plan."""
    num_skipped_records: int = 0
    """Records that cannot be used and were left out."""
    skipped_records: tuple[str, ...] = ()
    """`FILE:LINE: what is wrong`, of the first 100."""
    noted_records: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`FILE:LINE` of the first records that were cut, dropped or split, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorStarted:
    """The supervisor process started."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorRestarted:
    """The supervisor process died and was restarted; training continued in between."""

    pid: int


# Nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined:
    """A node is ready for workers: its agent is connected and its fork server has imported everything."""

    node: str
    """Ray's node id."""
    host: str
    num_slots: int
    """Number of workers of this run that fit on the node."""
    agent_pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLeft:
    """A node is no longer part of the run."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionNoticeReceived:
    """A node will be preempted, or is at increased risk of it."""

    node: str
    source: str
    """Who sent the notice: `aws`, `gcp`, `azure`, `kubernetes` or `ray`."""
    seconds_left: float | None
    """None if the notice gives no time."""
    is_certain: bool = True
    """False for a rebalance recommendation, which may never be followed by a preemption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KilledForMemory:
    """Ray's memory monitor killed a process of the run, because its node had too little free memory."""

    process: str
    """`agent`, with the ranks of its node; `supervisor`, `recorder` or `corpus server`, which Ray restarts."""
    node: str
    """Of an agent; empty for the others."""
    host: str
    pid: int
    used_gib: float
    """Memory in use on the node."""
    limit_gib: float
    """Memory that the node has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingForMachines:
    """The run is paused, its state safe, until its minimum number of workers is available."""

    have: int
    need: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineForecast:
    """Whether the run is done by `resources.deadline`, or before it has taken `resources.max_hours`: when that is
    first known, and when it changes."""

    deadline: float
    """Seconds since the epoch, as is `ends_at`."""
    ends_at: float | None
    """With the present workers; None while there are none."""
    step: int
    num_workers: int
    needed_workers: int | None
    """With which the deadline would be met; None if it has passed."""
    max_workers: int
    """Of the job."""
    can_rent: bool
    """Whether the cluster rents spot and on-demand machines as the deadline needs them."""
    limit: str = "deadline"
    """Key in `resources`: `deadline` or `max_hours`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinesChosen:
    """The machines that a run is to have so that it is done by its deadline at the least cost."""

    num_spot: int
    num_on_demand: int
    slack_s: float
    """Time until the deadline less the time that all machines still need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionMoveAdvised:
    """Spot machines stay away from a run with a deadline, and the cluster file allows other regions."""

    here: str
    to: str
    """Region, or zone on GCP."""
    num_spot: int
    """Spot machines that the run has."""
    num_wanted: int
    missing_s: float
    """For how long spot machines have been missing."""
    slack_s: float
    """As of `MachinesChosen`."""
    pause_s: float
    """How long nothing trains in a move, until machines are requested there."""
    usd_per_hour: float
    """Of a spot machine there, on the day on which the cluster started."""
    move_usd: float | None
    """Traffic of the checkpoint from which the run resumes; None: unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostUpdated:
    """What the run has cost so far, if its machines state their price."""

    usd: float
    """Total, over all restarts of the run."""
    usd_per_hour: float
    """Current rate of all its machines together."""
    saved_usd: float = 0.0
    """How much more the same machines would have cost on demand, as far as their clusters know."""


# Generations: each is one set of workers


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipChangeStarted:
    """A generation is being stopped so that the next one can start."""

    generation: int
    """The one being stopped."""
    cause: str
    """`notice`, `loss`, `hang`, `growth`, `yield` or `failure`."""
    reason: str
    """Human-readable: which node or rank, and what happened to it."""
    seconds_since_cause: float
    """Time since the cause, if known: a hang is detected seconds after it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkServerFailed:
    """The process from which a node's ranks are forked ended before it was ready; it is started again."""

    node: str
    reason: str
    """How it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHung:
    """No rank has made progress for too long; the stack traces of all ranks are in their logs."""

    generation: int
    rank: int
    """The rank that stopped first."""
    node: str
    silent_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedDevices:
    """The ranks of a generation run on different kinds of device, and every step takes as long as the slowest's."""

    generation: int
    num_ranks: Mapping[str, int]
    """Number of ranks by the name of their GPU or processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallGpu:
    """A node has ranks on a GPU with less memory than the plan's estimate needs, and less than the planned GPU."""

    generation: int
    node: str
    host: str
    gpu: str
    memory_bytes: int
    needed_bytes: int
    """Of a rank at this number of workers, by the plan."""
    world_size: int
    planned_gpu: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerDetected:
    """A node whose own work takes longer than that of the others, again and again; all ranks wait for it."""

    generation: int
    node: str
    host: str
    rank: int
    """The slowest of its ranks."""
    device: str
    """Its GPU or processor; it is compared with ranks on the same kind."""
    ratio: float
    """`own_s` as a multiple of `usual_s`."""
    own_s: float
    """Median seconds of the rank's forward passes in a step, without waits for other ranks."""
    usual_s: float
    """Median of the same over the other ranks."""
    action: str
    """`kept`; `requested`: it works until another node is ready; `replaced`: its ranks move to another node; `left
    out`: the run goes on with fewer workers.
    """
    reason: str
    """Why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStarting:
    """The workers of a new generation are being started."""

    generation: int
    world_size: int
    from_step: int
    source: str
    """Where the state comes from: `memory` or `storage` (nothing is loaded at step 0)."""
    num_spare: int = 0
    """Workers that get no rank, since the plan estimates shorter steps without them."""
    num_split_groups: int = 0
    """Groups of ranks that should be on one node and are on several, so that gathers take longer than the plan
    estimates."""
    num_shard_groups: int = 1
    """Groups of ranks that each hold the whole state."""
    parts_per_shard: int = 0
    """Parts of a shard of which each rank's snapshots have one, as other groups have it too; 0: each rank's
    snapshots are sent to another node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLocation:
    """Where one rank runs."""

    rank: int
    node: str
    pid: int | None
    """None if its agent has not reported it yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStarted:
    """All workers of a generation are ready to train."""

    generation: int
    world_size: int
    device: str
    peak_flops: float
    """Sum over all ranks, in the job's precision; nan if unknown."""
    peak_source: str
    seconds: Mapping[str, float]
    """Duration of each phase of the start: decide, stop, fork, rendezvous, build, load, ..."""
    ranks: tuple[RankLocation, ...] = ()
    """Empty if the engine does not report locations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChosen:
    """The ranks of a generation agreed on one of several implementations of attention (`training.attention`)."""

    name: str
    """As transformers' `attn_implementation`."""
    reason: str
    """Why none before it in the plan's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientsNotQuantized:
    """A generation reduces gradients unquantised, although the plan quantises them at its number of workers
    (`training.zero.quantized_gradients`)."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersCompiled:
    """The layers of the model were compiled in the first step of a generation (`training.compile`)."""

    num_layers: int
    num_graphs: int
    """Compiled once each, and shared by the layers."""
    num_from_cache: int
    """Of `num_graphs`, those that an earlier generation or run had compiled on this node."""
    seconds: float
    """Rank 0 spent on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileFailed:
    """A rank could not compile its layers, and goes on without.

    Recorded once in a run for each cause, of the first node that reports it.
    """

    reason: str
    seconds: float
    """Spent on trying."""
    node: str = ""
    """Of the rank; empty if the engine does not report locations."""


# State: snapshots, checkpoints, evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotIntervalChanged:
    """A new interval between snapshots to host memory was chosen from the measured cost of a snapshot."""

    every: int
    """Steps."""
    seconds: float
    """Training time that one snapshot costs."""
    share: float
    """That cost as a share of the time of the `every` steps, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIntervalChanged:
    """With `checkpoint.every: auto`, a new interval between checkpoints was chosen from what was measured."""

    seconds: float
    before_s: float
    """The interval until now."""
    cost_s: float
    """Training time that one checkpoint costs."""
    mtbf_s: float
    """Estimated mean time until the state in memory is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A durable checkpoint was committed; recorded once for each step."""

    step: int
    folder: str
    """Folder or URL."""
    size_bytes: int
    seconds: float
    """From the end of its step to the commit; training continues in the meantime. Unknown (nan) if its ranks ended
    before the commit: it is then recorded with the next checkpoint, or when the run ends or is resumed."""
    stall_s: float
    """How long training was blocked by it; unknown (nan) likewise."""
    removed: tuple[int, ...] = ()
    """Steps of older checkpoints that were removed before it was written, because the disk had no room for both."""
    is_best: bool = False
    """Whether it was written because its evaluation is among the best (`checkpoint.keep_best`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed:
    """A checkpoint could not be written; training continues and the previous checkpoint stays the newest."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSkipped:
    """The search for the newest checkpoint skipped one that failed verification."""

    folder: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRepeated:
    """A recorded step was run again because its result was lost; `metrics.jsonl` keeps the first record."""

    step: int
    loss: float
    step_s: float
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The held-out loss was measured."""

    step: int
    loss: float
    metrics: Mapping[str, float]
    """What the objective reports besides the loss, by name."""
    num_tokens: int
    weights: str
    """`current` or `ema`."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProgress:
    """An evaluation on held-out data is still running."""

    step: int
    weights: str
    """`current` or `ema`."""
    num_done: int
    """Batches of rank 0."""
    num_batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopped:
    """The run ended before its last step because an evaluation metric no longer improved."""

    step: int
    metric: str
    best: float | None
    """The best value of the metric; None if it never was a finite number."""
    best_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksScored:
    """A checkpoint was scored in the tasks of `evaluate`; intervals and answers are in `evaluation.jsonl`."""

    step: int
    scores: Mapping[str, float]
    """Values that are defined, by `TASK/METRIC`."""
    num_examples: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksFailed:
    """A checkpoint could not be scored; the run itself has finished."""

    step: int
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsComputed:
    """Progress of a map over shards on a cluster: an evaluation, or a file of prompts."""

    num_done: int
    num_shards: int
    num_lost: int = 0
    """Workers that were lost or replaced."""
    most_workers: int = 0
    """0 until the map is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapMessage:
    """What happened to the workers of such a map."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGenerated:
    """Text generated from the current weights."""

    step: int
    prompt: str
    text: str
    seconds: float = 0.0
    """To import torch, load the checkpoint and generate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFailed:
    """No text could be generated from the last weights; the run itself has finished."""

    step: int
    reason: str
    seconds: float = 0.0
    """Until it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingDegraded:
    """A tracker, such as W&B, cannot be reached or lacks steps; the run continues."""

    reason: str
    """What happened, and where the steps are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertSent:
    """A receiver of `alerts:` took a message."""

    receiver: str
    """`webhook`, `command` or `W&B`."""
    kind: str
    """Of `alerts.on`."""
    text: str
    count: int
    """How many alerts of the kind the message is about."""
    until: float
    """Time of the last of them, in seconds since the epoch: none up to then is sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertNotSent:
    """A receiver of `alerts:` did not take a message, which is not sent again; the run continues."""

    receiver: str
    kind: str
    text: str
    count: int
    until: float
    reason: str


# Search


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSuggested:
    """The searcher chose the values of the next trial."""

    trial: int
    """Counted from 1."""
    values: Mapping[str, Any]
    """By dotted key of the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted:
    """A trial completed its first step, or its first step after it was resumed."""

    trial: int
    total_steps: int
    seconds: float
    """From the decision to run the trial to the end of that step."""
    is_warm: bool
    """Whether its workers were forked from a fork server that an earlier trial had started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReported:
    """A trial reported the search's metric."""

    trial: int
    step: int
    value: float
    """Of the search's metric."""
    metrics: Mapping[str, float | int | None]
    """The complete record of that step in the trial's `metrics.jsonl`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialExploited:
    """Population-based training: a trial continues from a copy of another trial's state with other values."""

    trial: int
    donor: int
    step: int
    """Step of the copied state."""
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationRoundCompleted:
    """All trials of a population were compared at a step; their `TrialExploited` events precede this one."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded:
    """A trial ended."""

    trial: int
    status: str
    """`finished`; `stopped` early by the scheduler; `diverged`, its loss is not finite; `failed`."""
    step: int
    value: float | None
    """The last reported value of the search's metric."""
    reason: str = ""


# End of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStopped:
    """The run ended before its last step, on request or because it reached a cost limit."""

    step: int
    reason: str = ""
    """Why forge stopped it; empty if a user did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """The run completed its last step."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    """The run ended with an error."""

    error: str
    """Name of the class in `forge.errors`."""
    message: str


Event = (
    RunStarted
    | EnvironmentRecorded
    | LengthChanged
    | CorpusRead
    | SupervisorStarted
    | SupervisorRestarted
    | NodeJoined
    | NodeLeft
    | PreemptionNoticeReceived
    | WaitingForMachines
    | CostUpdated
    | DeadlineForecast
    | MachinesChosen
    | RegionMoveAdvised
    | MembershipChangeStarted
    | KilledForMemory
    | ForkServerFailed
    | RankHung
    | MixedDevices
    | SmallGpu
    | StragglerDetected
    | GenerationStarting
    | GenerationStarted
    | AttentionChosen
    | GradientsNotQuantized
    | LayersCompiled
    | CompileFailed
    | SnapshotIntervalChanged
    | CheckpointIntervalChanged
    | CheckpointSaved
    | CheckpointFailed
    | CheckpointSkipped
    | StepRepeated
    | Evaluated
    | EvaluationProgress
    | EarlyStopped
    | TasksScored
    | TasksFailed
    | ShardsComputed
    | MapMessage
    | SampleGenerated
    | SampleFailed
    | TrackingDegraded
    | AlertSent
    | AlertNotSent
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
    """One optimizer step: one line of `metrics.jsonl`."""

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
    """Maximum over all ranks: GPU memory on CUDA, resident memory on CPU."""
    world_size: int
    held_out_loss: float | None = None
    """None if it was not measured at this step."""
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the objective reports besides the loss, by its key in `metrics.jsonl`: `train/<name>`, `eval/<name>`."""

    def as_record(self) -> dict[str, float | int | None]:
        """Return the metrics under the keys of W&B and `metrics.jsonl`; a value that is not finite becomes null."""
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
        return {key: _finite(value) for key, value in ({**record, **self.extra, **record}).items()}


class Reporter(Protocol):
    """Where a worker sends its events and metrics. Only rank 0 reports; other ranks get a null reporter."""

    def event(self, event: Event) -> None:
        """Send an event without waiting for it to be written."""

    def step(self, metrics: StepMetrics) -> None:
        """Send the metrics of a step without waiting for them to be written."""

    def resend(self, metrics: StepMetrics) -> None:
        """Send again the metrics of an earlier step, which may have been lost."""

    def should_stop(self) -> bool:
        """Whether the run must write a checkpoint and stop."""

    def should_drain(self) -> bool:
        """Whether this generation must end after a snapshot, from which the next one continues."""


class NullReporter:
    """The reporter of every rank except rank 0."""

    def event(self, event: Event) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        pass

    def resend(self, metrics: StepMetrics) -> None:
        pass

    def should_stop(self) -> bool:
        return False

    def should_drain(self) -> bool:
        return False


def event_to_record(event: Event) -> dict[str, Any]:
    """Return `{"event": "CheckpointSaved", "step": 100, ...}`; a value that is not finite becomes null."""
    body = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {"event": type(event).__name__} | {key: _finite(value) for key, value in body.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, RankLocation | PatternRead):
        return _finite(dataclasses.asdict(value))
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value
