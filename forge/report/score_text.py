"""Describe the tasks that a run is scored in, and its scores."""

from __future__ import annotations

from forge.config.evaluate import EvaluateSpec
from forge.runs.scores import TaskScore
from forge.units import format_bytes


def tasks_text(spec: EvaluateSpec, *, copy_bytes: int) -> str:
    """Describe `evaluate` of a job.

    Args:
        copy_bytes: of the weights that each worker holds once more while it scores them during training.
    """
    which = {"last": "last checkpoint", "best": "best checkpoint", "kept": "kept checkpoints"}
    most = "" if spec.limit is None else f", at most {spec.limit:,} examples each"
    tasks = ", ".join(spec.tasks)
    when = ""
    if spec.is_in_training:
        size = format_bytes(copy_bytes)
        when = "at each evaluation" if spec.every == "evaluation" else f"every {spec.every}"
        when = f"{when} the current weights, of which each worker then holds a copy ({size}), and at the end "
    return f"{when}the {which[spec.checkpoints]} in {tasks}{most}; the machines are kept for it after the last step"


def score_text(score: TaskScore) -> str:
    """Describe the scores of a task: values with their 95 % intervals, and the step."""
    values = (
        f"{name} {value.value:.4g} [{_bound(value.low)}, {_bound(value.high)}]"
        for name, value in score.values.items()
        if value.value is not None
    )
    return f"{', '.join(values)} of {score.num_examples:,} examples at step {score.step}"


def _bound(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
