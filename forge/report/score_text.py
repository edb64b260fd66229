"""Describe the tasks that a run is scored in, and its scores."""

from __future__ import annotations

from forge.config.evaluate import EvaluateSpec
from forge.plan.plan import DraftPlan
from forge.runs.scores import TaskScore
from forge.units import format_bytes


def tasks_text(plan: DraftPlan, *, spec: EvaluateSpec) -> str:
    """Describe `evaluate` of a job; trials of a search are not scored after their last step."""
    which = {"last": "last checkpoint", "best": "best checkpoint", "kept": "kept checkpoints"}
    most = "" if spec.limit is None else f", at most {spec.limit:,} examples each"
    tasks = ", ".join(spec.tasks)
    when = ""
    if spec.is_in_training:
        size = format_bytes(plan.model.num_parameters * (2 if plan.job.training.precision == "bf16" else 4))
        when = "at each evaluation" if spec.every == "evaluation" else f"every {spec.every}"
        when = f"{when} the current weights, of which each worker then holds a copy ({size}), "
        if plan.search is not None:
            return f"{when}in {tasks}{most}"
        when += "and at the end "
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
