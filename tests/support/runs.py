"""Folders of runs as the recorder writes them, without training."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.config.resources import TrackingSpec
from forge.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    GenerationStarted,
    GenerationStarting,
    MembershipChangeStarted,
    RankLocation,
    RunStarted,
    RunStopped,
    StepMetrics,
    StepRepeated,
    WaitingForMachines,
    event_to_record,
)
from forge.plan.plan import plan_to_json
from forge.runs.recorder import Recorder
from tests.support.jobs import tiny_plan


def metrics(step: int, *, loss: float | None = None, grad_norm: float = 1.0) -> StepMetrics:
    """Metrics of a step; by default the loss falls with its number."""
    return StepMetrics(
        step=step,
        loss=5.0 / step if loss is None else loss,
        learning_rate=1e-2,
        grad_norm=grad_norm,
        num_tokens=192 * step,
        tokens_per_s=1000.0,
        mfu=math.nan,
        step_s=0.2,
        peak_memory_gib=0.5,
        world_size=2,
    )


def open_recorder(folder: Path, *, mode: str = "disabled", **trackers: Any) -> Recorder:
    """A recorder, by default without trackers.

    Args:
        trackers: other keys of `tracking`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tracking = TrackingSpec.model_validate({"wandb": {"project": "tests", "mode": mode}, **trackers})
    return Recorder(folder, run_id=folder.name, tracking=tracking, config={"name": "tiny"})


def make_run(
    root: Path, name: str = "tiny-0101-000000-abcd", *, steps: int = 3, endings: Sequence[Event] = ()
) -> Path:
    """The folder of a run of the tiny job with some steps and then the events `endings`."""
    folder = root / name
    (folder / "logs").mkdir(parents=True)
    (folder / "plan.json").write_text(plan_to_json(tiny_plan()))
    recorder = open_recorder(folder)
    recorder.event(RunStarted(run_id=name, total_steps=6, resumed_from_step=0))
    for step in range(1, steps + 1):
        recorder.step(metrics(step))
    if steps:
        recorder.event(
            Evaluated(
                step=steps, loss=2.0, metrics={"perplexity": 7.39}, num_tokens=100, weights="current", seconds=0.1
            )
        )
    for event in endings:
        recorder.event(event)
    recorder.close(exit_code=0)
    return folder


class History:
    """Events and metrics of a run that never ran, at chosen times, and its goodput by bucket."""

    def __init__(self, *, began: float = 1_000_000.0) -> None:
        self.now = began
        self.events: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.spent: Counter[str] = Counter()
        """Seconds of each bucket."""
        self.nodes: tuple[str, ...] = ("a", "b")
        """One rank on each."""
        self.is_training = False
        """A generation has taken its first step, and no change has begun since."""
        self._generation = 0
        self._is_formed = False

    @property
    def last_step(self) -> int:
        """The newest recorded step."""
        return self.steps[-1]["step"] if self.steps else 0

    def spend(self, seconds: float, bucket: str) -> None:
        """Let time pass in a bucket."""
        self.now += seconds
        self.spent[bucket] += seconds

    def record(self, event: Event) -> None:
        """Append an event at the present time."""
        self.events.append({"time": self.now} | event_to_record(event))

    def start(self) -> None:
        """The run starts or is resumed."""
        self.record(RunStarted(run_id="r", total_steps=1000, resumed_from_step=self.last_step))
        self.is_training = self._is_formed = False

    def form(self, seconds: float) -> None:
        """A generation with one rank per node starts."""
        self._generation += 1
        self._is_formed = False
        self.record(
            GenerationStarting(
                generation=self._generation,
                world_size=len(self.nodes),
                from_step=self.last_step,
                source="memory" if self.last_step else "storage",
            )
        )
        self.spend(seconds, "starting")

    def step(self, step: int, step_s: float, *, gap_s: float = 0.0, evaluation_s: float = 0.0) -> None:
        """One step, new or repeated; `gap_s` goes before it, the evaluation after it."""
        self.spend(gap_s, "other")
        self.spend(step_s, "training" if step > self.last_step else "repeated")
        self.is_training = True
        self.record_step(step, step_s, evaluation_s=evaluation_s)

    def record_step(self, step: int, step_s: float, *, evaluation_s: float = 0.0) -> None:
        """Record what the loop reports at the end of a step."""
        if not self._is_formed:
            self._is_formed = True
            ranks = tuple(RankLocation(rank=rank, node=node, pid=1) for rank, node in enumerate(self.nodes))
            self.record(
                GenerationStarted(
                    generation=self._generation,
                    world_size=len(self.nodes),
                    device="cpu",
                    peak_flops=1e12,
                    peak_source="test",
                    seconds={"fork": 0.1, "build": 0.2},
                    ranks=ranks,
                )
            )
        if evaluation_s:
            self.spend(evaluation_s, "evaluating")
            self.record(
                Evaluated(
                    step=step,
                    loss=1.0,
                    metrics={"perplexity": 2.7},
                    num_tokens=1,
                    weights="current",
                    seconds=evaluation_s,
                )
            )
        made = replace(metrics(step), step_s=step_s, world_size=len(self.nodes))
        if step > self.last_step:
            self.steps.append(made.as_record() | {"time": self.now})
        else:
            self.record(StepRepeated(step=step, loss=1.0, step_s=step_s, world_size=len(self.nodes)))

    def change(self, cause: str, *, reason: str = "", since_s: float = 0.0) -> None:
        """A generation ends."""
        self.record(
            MembershipChangeStarted(
                generation=self._generation, cause=cause, reason=reason or cause, seconds_since_cause=since_s
            )
        )
        self.is_training = False

    def wait(self, seconds: float) -> None:
        """Wait for nodes."""
        self.record(WaitingForMachines(have=1, need=2))
        self.spend(seconds, "waiting")

    def saved(self, step: int, *, seconds: float, stall_s: float) -> None:
        """A checkpoint is reported."""
        self.record(CheckpointSaved(step=step, folder="x", size_bytes=1, seconds=seconds, stall_s=stall_s))

    def stop(self, *, saving_s: float = 0.0) -> None:
        """The run is stopped; if it is training, it writes a last checkpoint first."""
        if self.is_training and saving_s:
            self.spend(saving_s, "saving")
            self.saved(self.last_step, seconds=saving_s, stall_s=0.0)
        self.record(RunStopped(step=self.last_step))
        self.is_training = False

    def write(self, root: Path, name: str) -> Path:
        """Write the folder of the run. Returns: the folder."""
        folder = root / name
        (folder / "logs").mkdir(parents=True)
        (folder / "plan.json").write_text(plan_to_json(tiny_plan()))
        for file, records in (("events.jsonl", self.events), ("metrics.jsonl", self.steps)):
            (folder / file).write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder
