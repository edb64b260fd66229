"""What can happen to a run, typed.

Every event is one line of `events.jsonl`, every step one line of `metrics.jsonl`; the screen, the
report and W&B are made of these two files and of nothing else. An event says what happened, never how
it looks.
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
class GenerationFormed:
    """The ranks of one membership stand ready."""

    generation: int
    world_size: int
    device: str
    peak_flops: float
    """Of all ranks together, in the job's precision; nan if unknown."""
    peak_source: str
    seconds: Mapping[str, float]
    """What forming was made of: import, model, engine, load, ..."""


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
class RunStopped:
    """The run ended before its last step because it was asked to."""

    step: int


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
    | GenerationFormed
    | Evaluated
    | CheckpointSaved
    | CheckpointFailed
    | CheckpointSkipped
    | StepRepeated
    | TrackingDegraded
    | SampleGenerated
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

    def should_stop(self) -> bool:
        """Whether the run was asked to checkpoint and stop."""


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
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value
