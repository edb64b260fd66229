"""Resume a run with another length: the curve up to the last recorded step stays, the schedule after it stretches.

The learning rate is a function of the step and of the length. A run that is resumed with another length keeps the
old length for the steps that it has recorded, so that repeating one of them after a failure gives the same result,
and follows the new length from the next step on. The plan holds every length that the run has had.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from forge.config.job import JobSpec
from forge.errors import PlanError
from forge.plan.curve import LENGTH_KEYS, config_digest
from forge.plan.plan import DraftPlan, Plan
from forge.plan.schedule import FormerLength

PlanT = TypeVar("PlanT", bound=DraftPlan)


def is_same_length(before: JobSpec, now: JobSpec) -> bool:
    """Whether two jobs have the same length, in the same unit."""
    return all(getattr(before.training, key) == getattr(now.training, key) for key in LENGTH_KEYS)


def continue_plan(plan: PlanT, *, before: Plan, last_step: int, is_stopped_early: bool = False) -> PlanT:
    """Return the plan of a run that is resumed, with the lengths that it had before.

    Args:
        plan: of the job as it is now.
        before: the plan that the run had until now.
        last_step: the last step that the run has recorded.
        is_stopped_early: whether `training.early_stopping` has ended the run.

    Raises: PlanError if the new length is below what the run has reached, or early stopping has ended it.
    """
    if is_same_length(before.job, plan.job):
        return replace(plan, former_lengths=before.former_lengths)
    if plan.total_steps < last_step:
        raise PlanError(
            f"{_length(plan.job)} is {plan.total_steps:,} steps, but the run has already reached step "
            f"{last_step:,}; give at least that many steps"
        )
    if is_stopped_early:
        raise PlanError(
            f"training.early_stopping has ended the run at step {last_step:,}, so another length does not continue "
            "it; start a new run from its weights with model.init_from"
        )
    if before.former_lengths and before.former_lengths[-1].until_step == last_step:  # no step had that length
        return replace(plan, former_lengths=before.former_lengths)
    former = FormerLength(
        given=_length(before.job),
        schedule=before.schedule_steps,
        until_step=last_step,
        config_digest=config_digest(before.job, code=before.code),
    )
    return replace(plan, former_lengths=(*before.former_lengths, former))


def _length(job: JobSpec) -> str:
    key = next(key for key in LENGTH_KEYS if getattr(job.training, key) is not None)
    return f"{key}: {getattr(job.training, key)}"
