"""The training loop: batch, forward, backward, update, and what follows from the step's number.

It knows the plan and the step, and nothing of machines. Every rank runs it; rank 0 reports, and its wishes
(evaluate, save, leave) become everybody's in the all-reduce that ends a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from forge.checkpoint.manifest import Progress
from forge.config.resources import CheckpointSpec
from forge.config.training import TrainingSpec
from forge.data.loader import HeldOutBatches, TrainBatches
from forge.errors import CheckpointError, DivergedError
from forge.events import (
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Reporter,
    SnapshotIntervalChanged,
    StepMetrics,
    perplexity,
)
from forge.train.async_checkpoint import AsyncCheckpointer, CheckpointWritten, Outcome
from forge.train.engine import Engine, StepControl, StepResult
from forge.train.lr_schedule import learning_rate
from forge.train.snapshot_interval import SnapshotInterval
from forge.train.snapshotter import Snapshotter


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """What the loop goes through, and how far."""

    training: TrainingSpec
    checkpoint: CheckpointSpec
    total_steps: int
    pause_at: int | None
    """The step after which to stop, with a checkpoint, though it is not the last."""
    batches: TrainBatches
    held_out: HeldOutBatches
    flops_per_token: int
    peak_flops: float

    @property
    def last_step(self) -> int:
        """After which the loop ends."""
        return min(self.total_steps, self.pause_at or self.total_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopResult:
    """How the loop ended."""

    progress: Progress
    is_drained: bool = False
    """Another generation goes on from here; otherwise everything up to here is in a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPolicy:
    """Copies of the state that outlive the rank, and how often they are taken."""

    copier: Snapshotter
    pace: SnapshotInterval


def train(
    engine: Engine,
    curriculum: TrainInputs,
    *,
    start: Progress,
    saving: AsyncCheckpointer,
    snapshots: SnapshotPolicy | None = None,
    on_formed: Callable[[], None] = lambda: None,
    reporter: Reporter,
) -> LoopResult:
    """Train from `start` to the last step or the one to pause at, or until asked to stop or to leave; collective.

    Args:
        on_formed: called after the first step, or at once if there is none to do.

    Raises: DivergedError if the loss or the gradient is no number, CheckpointError if the last checkpoint
        cannot be written.
    """
    training = curriculum.training
    progress, saved_step = start, start.step
    saved_at = evaluated_at = time.monotonic()
    is_save_due = False
    tokens = curriculum.batches.tokens_per_step
    if progress.step >= curriculum.last_step:
        on_formed()
    while progress.step < curriculum.last_step:
        step, began = progress.step + 1, time.monotonic()
        is_last = step == curriculum.last_step
        # A checkpoint that is due while another is in the making begins when that one is sealed.
        is_save_due |= curriculum.checkpoint.every.is_due(step=step, seconds_since_last=began - saved_at)
        is_evaluation_due = training.evaluate_every.is_due(step=step, seconds_since_last=began - evaluated_at)
        lr = learning_rate(
            training.schedule, step=step, total_steps=curriculum.total_steps, peak=training.optimizer.lr
        )
        result = engine.step(
            step,
            curriculum.batches.of_step(step),
            num_tokens=tokens,
            lr=lr,
            wishes=partial(
                _wishes,
                reporter,
                saving,
                save=is_last or is_save_due,
                snapshot=snapshots is not None and snapshots.pace.is_due(step),
                evaluate=is_last or is_evaluation_due,
            ),
            snapshot_cost_s=snapshots.copier.take_cost_s if snapshots else lambda: 0.0,
        )
        step_s = time.monotonic() - began
        if progress is start:
            on_formed()
        if not _is_finite(result.loss, result.grad_norm):
            saved_step = _report(saving.finish(), reporter) or saved_step
            raise _diverged(result.loss, result.grad_norm, step=step, lr=lr, saved_step=saved_step)
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
        saved_step = _report(saving.outcomes(), reporter) or saved_step
        if result.flags.trouble:
            _report(saving.give_up(), reporter)
        if is_last or result.flags.stop:
            _save_for_certain(saving, progress, reporter)
            if result.flags.stop:
                return LoopResult(progress=progress)
        elif result.flags.leave and snapshots is not None:
            snapshots.copier.begin(progress)
            snapshots.copier.finish()
            return LoopResult(progress=progress, is_drained=True)
        elif result.flags.save:
            saving.begin(progress)
            saved_at, is_save_due = time.monotonic(), False
        elif result.flags.snapshot and snapshots is not None:
            snapshots.copier.begin(progress)
        if snapshots is not None:
            _pace(snapshots.pace, result, step=step, step_s=step_s, reporter=reporter)
    is_whole = progress.step >= curriculum.total_steps
    if is_whole and training.ema is not None and curriculum.held_out.num_sequences:
        engine.state.swap_average()
        evaluate(engine, curriculum.held_out, step=progress.step, weights="ema", reporter=reporter)
        engine.state.swap_average()
    return LoopResult(progress=progress)


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


def _wishes(
    reporter: Reporter, saving: AsyncCheckpointer, *, save: bool, snapshot: bool, evaluate: bool
) -> StepControl:
    """What is wished for at the end of a step, as late as it can be asked."""
    return StepControl(
        stop=reporter.should_stop(),
        leave=reporter.should_drain(),
        save=save and not saving.is_busy,
        snapshot=snapshot,
        evaluate=evaluate,
        trouble=saving.has_failed,
    )


def _pace(pace: SnapshotInterval, result: StepResult, *, step: int, step_s: float, reporter: Reporter) -> None:
    """Choose the pace of snapshots anew; the same on every rank but for noise, and rank 0's is taken."""
    if result.flags.save or result.flags.snapshot:
        pace.took(step)
    if pace.learn(step_s=step_s, cost_s=result.snapshot_cost_s):
        reporter.event(SnapshotIntervalChanged(every=pace.every, seconds=pace.cost_s, share=pace.share))


def _save_for_certain(saving: AsyncCheckpointer, progress: Progress, reporter: Reporter) -> None:
    """Save and wait for it, a second time if need be: a saver may be killed at any moment, and is started anew.

    Raises: CheckpointError on every rank if it cannot be written.
    """
    for _ in range(2):
        saving.begin(progress)
        outcomes = saving.finish()
        failed = [
            outcome
            for outcome in outcomes
            if not isinstance(outcome, CheckpointWritten) and outcome.step == progress.step
        ]
        _report((outcome for outcome in outcomes if outcome not in failed), reporter)
        if not failed:
            return
    raise CheckpointError(f"the checkpoint of step {progress.step} could not be written by {failed[0].reason}")


def _report(outcomes: Iterable[Outcome], reporter: Reporter) -> int:
    """A checkpoint that fails in the middle of a run is reported and survived. Returns: the newest saved, or 0."""
    newest = 0
    for outcome in outcomes:
        if isinstance(outcome, CheckpointWritten):
            newest = max(newest, outcome.step)
            reporter.event(
                CheckpointSaved(
                    step=outcome.step,
                    folder=outcome.folder,
                    size_bytes=outcome.size_bytes,
                    seconds=outcome.seconds,
                    stall_s=outcome.stall_s,
                )
            )
        else:
            reporter.event(
                CheckpointFailed(
                    step=outcome.step, reason=f"the checkpoint could not be written by {outcome.reason}"
                )
            )
    return newest


def _is_finite(loss: float, grad_norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm >= 0


def _diverged(loss: float, grad_norm: float, *, step: int, lr: float, saved_step: int) -> DivergedError:
    """The end of a run at the first step that is no number: the weights are spoilt from here on."""
    kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "no checkpoint was written yet"
    return DivergedError(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, at a learning rate of {lr:.3g}; "
        f"{kept}. Lower training.optimizer.lr, raise schedule.warmup_steps, or set optimizer.grad_clip"
    )
