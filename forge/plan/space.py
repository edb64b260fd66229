"""Compare what a run writes to a disk with the free space there. Pure."""

from __future__ import annotations

import math

from forge.config.training import TrainingSpec
from forge.errors import PlanError
from forge.plan.inputs import ModelInfo
from forge.plan.parameter_groups import groups_of, optimizer_state
from forge.plan.plan import DraftPlan
from forge.units import format_bytes

RECORDS_BYTES = 16 * 2**20
"""For the tokenizer, logs, events and metrics of a run; metrics have about 600 bytes a step."""


def checkpoint_bytes(model: ModelInfo, training: TrainingSpec) -> int:
    """Return the size of one checkpoint: fp32 weights, the optimizer's state, averaged weights, frozen weights."""
    frozen = model.num_parameters - model.num_trainable_parameters - model.num_base_parameters
    width = 2 if training.precision == "bf16" else 4
    state = optimizer_state(groups_of(training, model))
    return (8 if training.ema else 4) * model.num_trainable_parameters + state.total_bytes + width * frozen


def space_warning(plan: DraftPlan, *, folder: str, free_bytes: int, must_fit: bool) -> str | None:
    """Compare the free space of a run's file system with what its checkpoints take; None if they fit.

    Old checkpoints are removed after a new one is complete, so there is one more than `checkpoint.keep` and
    `checkpoint.keep_best` for a moment; where that does not fit, old ones are removed first, but never the newest.

    Args:
        folder: in which the run folders are.
        free_bytes: what can be written there, the run's own earlier checkpoints included.
        must_fit: whether the run is about to start there.

    Raises: PlanError if it must fit and not even one checkpoint does.
    """
    checkpoint = plan.job.checkpoint
    size = checkpoint_bytes(plan.model, plan.job.training)
    steps = None if checkpoint.every == "auto" else checkpoint.every.steps
    num_written = math.inf if steps is None else plan.total_steps / steps
    num_best = checkpoint.keep_best or 0
    count = num_best + int(min(checkpoint.keep + 1, max(1.0, num_written)))
    if plan.search is not None:  # each trial keeps its own
        count = plan.search.num_trials * min(checkpoint.keep + num_best, count) + plan.search.trials_at_once
    needed = count * size + RECORDS_BYTES
    if needed <= free_bytes:
        return None
    text = (
        f"the disk of {folder} has {format_bytes(free_bytes)} free, and the run takes up to "
        f"{format_bytes(needed)}: {count} checkpoint{'s' * (count > 1)} of {format_bytes(size)} "
        f"(checkpoint.keep: {checkpoint.keep}{f', keep_best: {num_best}' * (num_best > 0)}, and "
        "the one being written), logs and metrics"
    )
    what_to_do = "free some space, lower checkpoint.keep, or set checkpoint.to to another disk or an object store"
    if size > free_bytes:
        text = f"{text}. Not even one checkpoint fits, so no weights could be kept; {what_to_do}"
        if must_fit:
            raise PlanError(text)
        return text
    few = "only one fits, so later ones fail until space is free" if 2 * size > free_bytes else ""
    return f"{text}. When it is full, {few or 'older ones are removed before a new one is written'}; {what_to_do}"
