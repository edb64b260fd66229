"""The training loop: batch, forward, backward, update, and what follows from the step's number.

It knows the plan and the step, and nothing of machines. Every rank runs it; rank 0 reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from forge.data.batches import HeldOutBatches, TrainBatches
from forge.errors import CheckpointError, RunError
from forge.events import CheckpointFailed, CheckpointSaved, Evaluated, Reporter, StepMetrics, perplexity
from forge.spec.resources import CheckpointSpec
from forge.spec.training import TrainingSpec
from forge.train.checkpoint import Progress, Saved
from forge.train.engine import Engine, Flags
from forge.train.schedule import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """What the loop goes through, and how far."""

    training: TrainingSpec
    checkpoint: CheckpointSpec
    total_steps: int
    batches: TrainBatches
    held_out: HeldOutBatches
    flops_per_token: int
    peak_flops: float


def train(
    engine: Engine,
    curriculum: Curriculum,
    *,
    start: Progress,
    save: Callable[[Progress], Saved],
    reporter: Reporter,
) -> Progress:
    """Train from `start` to the last step, or until asked to stop; collective.

    Returns: how far it came; everything up to there is in a checkpoint.
    Raises: RunError if the loss or the gradient is no number, CheckpointError if the last checkpoint
        cannot be written.
    """
    training = curriculum.training
    progress, saved_step = start, start.step
    saved_at = evaluated_at = time.monotonic()
    while progress.step < curriculum.total_steps:
        step, began = progress.step + 1, time.monotonic()
        is_last = step == curriculum.total_steps
        wishes = Flags(
            stop=reporter.should_stop(),
            save=is_last or curriculum.checkpoint.every.is_due(step=step, seconds_since_last=began - saved_at),
            evaluate=is_last or training.evaluate_every.is_due(step=step, seconds_since_last=began - evaluated_at),
        )
        lr = learning_rate(
            training.schedule, step=step, total_steps=curriculum.total_steps, peak=training.optimizer.lr
        )
        tokens = curriculum.batches.tokens_per_step
        result = engine.step(step, curriculum.batches.of_step(step), num_tokens=tokens, lr=lr, flags=wishes)
        step_s = time.monotonic() - began
        _require_finite(result.loss, result.grad_norm, step=step, lr=lr, saved_step=saved_step)
        progress = Progress(
            step=step, num_tokens=progress.num_tokens + tokens, recipe=start.recipe, corpus=start.corpus
        )
        held_out_loss = None
        if result.flags.evaluate and curriculum.held_out.num_sequences:
            held_out_loss = evaluate(engine, curriculum.held_out, step=step, weights="current", reporter=reporter)
            evaluated_at = time.monotonic()
        reporter.step(
            StepMetrics(
                step=step,
                loss=result.loss,
                learning_rate=lr,
                grad_norm=result.grad_norm,
                num_tokens=progress.num_tokens,
                tokens_per_s=tokens / step_s,
                mfu=curriculum.flops_per_token * tokens / step_s / curriculum.peak_flops,
                step_s=step_s,
                peak_memory_gib=result.peak_memory_gib,
                world_size=curriculum.batches.plan.world_size,
                held_out_loss=held_out_loss,
            )
        )
        if result.flags.save or result.flags.stop:
            must_succeed = is_last or result.flags.stop
            if _save(save, progress, must_succeed=must_succeed, reporter=reporter):
                saved_step = step
            saved_at = time.monotonic()
        if result.flags.stop:
            return progress
    if training.ema is not None and curriculum.held_out.num_sequences:
        engine.state.swap_average()
        evaluate(engine, curriculum.held_out, step=progress.step, weights="ema", reporter=reporter)
        engine.state.swap_average()
    return progress


def evaluate(engine: Engine, held_out: HeldOutBatches, *, step: int, weights: str, reporter: Reporter) -> float:
    """Mean cross entropy over all held-out tokens; collective."""
    began = time.monotonic()
    total, num_tokens = engine.evaluate(held_out)
    loss = total / num_tokens
    reporter.event(
        Evaluated(
            step=step,
            loss=loss,
            perplexity=perplexity(loss),
            num_tokens=num_tokens,
            weights=weights,
            seconds=time.monotonic() - began,
        )
    )
    return loss


def _save(save: Callable[[Progress], Saved], progress: Progress, *, must_succeed: bool, reporter: Reporter) -> bool:
    """A checkpoint that fails in the middle of a run is reported and survived; the last one must be there."""
    try:
        saved = save(progress)
    except CheckpointError as error:
        if must_succeed:
            raise
        reporter.event(CheckpointFailed(step=progress.step, reason=str(error)))
        return False
    reporter.event(
        CheckpointSaved(
            step=progress.step, folder=str(saved.folder), size_bytes=saved.size_bytes, seconds=saved.seconds
        )
    )
    return True


def _require_finite(loss: float, grad_norm: float, *, step: int, lr: float, saved_step: int) -> None:
    """Stop at the first step that is no number; the weights are spoilt from here on."""
    if math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm >= 0:
        return
    kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "no checkpoint was written yet"
    raise RunError(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, at a learning rate of {lr:.3g}; "
        f"{kept}. Lower training.optimizer.lr, raise schedule.warmup_steps, or set optimizer.grad_clip"
    )
