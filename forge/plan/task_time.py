"""How long scoring the tasks of `evaluate` takes: by a former run with the same tasks, else by FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from forge.config.load import load_task_text
from forge.config.task import TaskSpec
from forge.plan.plan import DraftPlan, Plan
from forge.plan.throughput import Estimate
from forge.units import Every

_MEASURED = Estimate(low=0.7, likely=1.0, high=1.5)
_READ_SHARE = Estimate(low=0.05, likely=0.4, high=1.0)
"""Tokens that are read for an example ÷ `data.seq_len`."""
_READ_TEXTS = {"multiple-choice": 4.0}
"""Texts of an example, by the kind of its task; else 1."""
_WRITTEN_SHARE = Estimate(low=0.05, likely=0.5, high=1.0)
"""Tokens of an answer ÷ `sampling.max_tokens`."""
_WRITTEN_COST = Estimate(low=0.5, likely=3.0, high=15.0)
"""Time of a token that is written ÷ that of one that is read: batches are small, and close choices computed again.

These four are assumed, not fitted: what a task's records hold is not read for a forecast."""


class ScoredRun(Protocol):
    """What a former run tells about its scorings."""

    @property
    def plan(self) -> Plan: ...

    @property
    def tasks_s(self) -> float | None:
        """Median duration of one."""


def num_scorings(plan: DraftPlan, *, seconds: float) -> int:
    """How often the tasks are scored in a run whose steps take so long, after its end included."""
    spec, steps = plan.job.evaluate, plan.total_steps
    if spec is None:
        return 0
    if not spec.is_in_training:
        return 1
    every = spec.every if isinstance(spec.every, Every) else plan.job.training.evaluate_every
    if every.steps is not None:
        return math.ceil(steps / every.steps) + 1
    return 2 + int(seconds / (every.seconds or math.inf))


def scoring_s(plan: DraftPlan, *, step_s: Estimate, former: Iterator[ScoredRun]) -> Estimate | None:
    """Return the seconds of one scoring on the workers of a plan; None if the number of examples is not known.

    Args:
        step_s: of a training step on these workers, whose FLOPs per second are those of scoring.
        former: runs on the same device, the newest first.
    """
    for run in former:
        spec, own = run.plan.job.evaluate, plan.job.evaluate
        is_same = run.plan.tasks == plan.tasks and spec is not None and own is not None and spec.limit == own.limit
        if is_same and run.tasks_s is not None:
            return _MEASURED.scaled(run.tasks_s * plan.flops_per_token / run.plan.flops_per_token)
    tasks = [load_task_text(text, path=path).task for path, text in plan.tasks.items()]
    counts = [_num_examples(plan, task) for task in tasks]
    if None in counts:
        return None
    training = plan.job.training
    tokens_of_step = training.global_batch_size * plan.job.data.seq_len
    low, likely, high = (
        # A forward pass is a third of a step's FLOPs.
        getattr(step_s, bound)
        / 3
        / tokens_of_step
        * sum((count or 0) * _tokens(plan, task, bound=bound) for task, count in zip(tasks, counts, strict=True))
        for bound in ("low", "likely", "high")
    )
    return Estimate(low=low, likely=likely, high=high)


def _tokens(plan: DraftPlan, task: TaskSpec, *, bound: str) -> float:
    """Tokens of an example, those that are written counted by what they cost."""
    read = getattr(_READ_SHARE, bound) * plan.job.data.seq_len * _READ_TEXTS.get(task.kind, 1.0)
    if task.kind != "generate":
        return float(read)
    written = getattr(_WRITTEN_SHARE, bound) * min(task.sampling.max_tokens, plan.job.data.seq_len)
    return float(read + written * getattr(_WRITTEN_COST, bound))


def _num_examples(plan: DraftPlan, task: TaskSpec) -> int | None:
    """The most examples of a task; None if only its data tell."""
    limits = [plan.job.evaluate.limit if plan.job.evaluate is not None else None, task.limit]
    if task.data.held_out and isinstance(plan, Plan):
        limits.append(plan.corpus.num_held_out_sequences)
    return min((limit for limit in limits if limit is not None), default=None)
