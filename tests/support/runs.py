"""Folders of runs as the recorder writes them, without training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from forge.events import Evaluated, Event, RunStarted, StepMetrics
from forge.plan.plan import plan_to_json
from forge.run.record import Recorder
from forge.spec.resources import WandbSpec
from tests.support.jobs import tiny_plan


def metrics(step: int, *, loss: float | None = None, grad_norm: float = 1.0) -> StepMetrics:
    """A step whose loss falls with its number."""
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


def open_recorder(folder: Path, *, mode: str = "disabled") -> Recorder:
    """The run's one writer, without W&B unless asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    wandb = WandbSpec.model_validate({"project": "tests", "mode": mode})
    return Recorder(folder, run_id=folder.name, wandb=wandb, config={"name": "tiny"})


def make_run(
    root: Path, name: str = "tiny-0101-000000-abcd", *, steps: int = 3, endings: Sequence[Event] = ()
) -> Path:
    """A run that recorded some steps of the tiny job, and then what `endings` say."""
    folder = root / name
    (folder / "logs").mkdir(parents=True)
    (folder / "plan.json").write_text(plan_to_json(tiny_plan(None)))
    recorder = open_recorder(folder)
    recorder.event(RunStarted(run_id=name, total_steps=6, resumed_from_step=0))
    for step in range(1, steps + 1):
        recorder.step(metrics(step))
    if steps:
        recorder.event(
            Evaluated(step=steps, loss=2.0, perplexity=7.39, num_tokens=100, weights="current", seconds=0.1)
        )
    for event in endings:
        recorder.event(event)
    recorder.close(exit_code=0)
    return folder
