"""Score the checkpoints of a run in the tasks of its job, after its last step, on the machines that it has."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import stored_steps
from forge.errors import ForgeError
from forge.events import Event, TasksFailed, TasksScored
from forge.plan.plan import Plan
from forge.runs.checkpoints import best_checkpoint
from forge.runs.reader import read_run
from forge.runtime.torch_subprocess import run_driver


def score_tasks(plan: Plan, *, folder: Path, step: int, address: str, record: Callable[[Event], None]) -> None:
    """Score the checkpoints that the job names; what cannot be scored is recorded, since the run has finished.

    Args:
        folder: of the run.
        step: its last one.
        address: of the Ray cluster, whose slots are free now.
    """
    for number in _steps(plan, folder=folder, last=step):
        began = time.monotonic()
        try:
            event: Event = _scored(plan, folder=folder, step=number, address=address)
        except ForgeError as error:
            event = TasksFailed(step=number, reason=str(error), seconds=time.monotonic() - began)
        record(event)


def _scored(plan: Plan, *, folder: Path, step: int, address: str) -> TasksScored:
    began = time.monotonic()
    assert plan.job.evaluate is not None, "called with tasks"
    request = {
        "source": str(folder),
        "tasks": [list(item) for item in plan.tasks.items()],
        "step": step,
        "dtype": "bf16" if plan.job.training.precision == "bf16" else "fp32",
        "limit": plan.job.evaluate.limit,
        "address": address,
        "examples": plan.task_examples,
    }
    answer = run_driver("forge.evaluate.run", request=request, what="cannot score the tasks of the job")
    scores = {
        f"{score['task']}/{name}": value["value"]
        for score in answer["scores"]
        for name, value in score["values"].items()
        if value["value"] is not None
    }
    return TasksScored(
        step=step,
        scores=scores,
        num_examples=sum(score["num_examples"] for score in answer["scores"]),
        seconds=time.monotonic() - began,
    )


def _steps(plan: Plan, *, folder: Path, last: int) -> list[int]:
    """The steps of the checkpoints to score, ascending."""
    assert plan.job.evaluate is not None, "called with tasks"
    if plan.job.evaluate.checkpoints == "kept":
        return sorted(stored_steps(open_storage(plan.job.checkpoint.url_of(str(folder)))))
    best = best_checkpoint(read_run(folder)) if plan.job.evaluate.checkpoints == "best" else None
    return [last if best is None or best.step is None else best.step]
