"""The training loop: batch, forward, backward, update, evaluation, checkpoint, snapshot.

It depends on the plan and the step, not on the machines. Every rank runs it; rank 0 reports, and its control
requests (evaluate, save, drain) reach all ranks in the all-reduce that ends a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
)
from forge.train.async_checkpoint import AsyncCheckpointer, CheckpointWritten, Outcome
from forge.train.early_stopping import EarlyStopping
from forge.train.engine import Engine, StepControl, StepResult
from forge.train.lr_schedule import learning_rate
from forge.train.snapshot_interval import SnapshotInterval
from forge.train.snapshotter import Snapshotter


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """The batches and settings of one worker's loop, and its last step."""

    training: TrainingSpec
    checkpoint: CheckpointSpec
    total_steps: int
    pause_at: int | None
    """The step after which to stop with a checkpoint, before the last one."""
    batches: TrainBatches
    held_out: HeldOutBatches
    flops_per_token: int
    peak_flops: float

    @property
    def last_step(self) -> int:
        return min(self.total_steps, self.pause_at or self.total_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopResult:
    """How the loop ended."""

    progress: Progress
    is_drained: bool = False
    """Whether the next generation continues from a snapshot; otherwise the state is in a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPolicy:
    """Takes snapshots of the state that outlive the worker, and decides how often."""

    snapshotter: Snapshotter
    interval: SnapshotInterval


def train(
    engine: Engine,
    inputs: TrainInputs,
    *,
    start: Progress,
    checkpointer: AsyncCheckpointer,
    snapshots: SnapshotPolicy | None = None,
    on_started: Callable[[], None] = lambda: None,
    reporter: Reporter,
) -> LoopResult:
    """Train from `start` to the last step, the pause step, or until asked to stop or to drain; collective.

    Args:
        on_started: called after the first step, or at once if no step is left.

    Raises: DivergedError if the loss or the gradient norm is not finite, CheckpointError if the last checkpoint
        cannot be written.
    """
    training = inputs.training
    stopping = EarlyStopping(spec=training.early_stopping, directions=engine.metric_directions)
    progress, saved_step = start, start.step
    saved_at = evaluated_at = time.monotonic()
    is_save_due = False
    if progress.step >= inputs.last_step or stopping.is_over(progress):
        on_started()
    while progress.step < inputs.last_step and not stopping.is_over(progress):
        step, began = progress.step + 1, time.monotonic()
        is_last = step == inputs.last_step
        # A checkpoint that is due while another is being written begins when that one is committed.
        is_save_due |= inputs.checkpoint.every.is_due(step=step, seconds_since_last=began - saved_at)
        is_evaluation_due = training.evaluate_every.is_due(step=step, seconds_since_last=began - evaluated_at)
        lr = learning_rate(training.schedule, step=step, total_steps=inputs.total_steps, peak=training.optimizer.lr)
        totals = inputs.batches.totals(step)
        tokens = totals.num_targets
        result = engine.step(
            step,
            inputs.batches.of_step(step),
            total_weight=totals.weight,
            lr=lr,
            requests=partial(
                _requests,
                reporter,
                checkpointer,
                save=is_last or is_save_due,
                snapshot=snapshots is not None and snapshots.interval.is_due(step),
                evaluate=is_last or is_evaluation_due,
            ),
            snapshot_cost_s=snapshots.snapshotter.take_cost_s if snapshots else lambda: 0.0,
        )
        step_s = time.monotonic() - began
        if progress is start:
            on_started()
        if not _is_finite(result.loss, result.grad_norm):
            saved_step = _report(checkpointer.finish(), reporter) or saved_step
            raise _diverged(result.loss, result.grad_norm, step=step, lr=lr, saved_step=saved_step)
        progress = replace(progress, step=step, num_tokens=progress.num_tokens + tokens)
        extra = {f"train/{name}": value for name, value in result.metrics.items()}
        held_out_loss = None
        if result.flags.evaluate and inputs.held_out.rows.num_rows:
            found = evaluate(engine, inputs.held_out, step=step, weights="current", reporter=reporter)
            held_out_loss = found.loss
            extra |= {f"eval/{name}": value for name, value in found.metrics.items()}
            evaluated_at = time.monotonic()
            progress = stopping.observe(found, progress=progress)
        reporter.step(
            StepMetrics(
                step=step,
                loss=result.loss,
                learning_rate=lr,
                grad_norm=result.grad_norm,
                num_tokens=progress.num_tokens,
                tokens_per_s=tokens / step_s,
                mfu=inputs.flops_per_token * totals.num_tokens / step_s / inputs.peak_flops,
                step_s=step_s,
                peak_memory_gib=result.peak_memory_gib,
                world_size=inputs.batches.plan.world_size,
                held_out_loss=held_out_loss,
                extra=extra,
            )
        )
        saved_step = _report(checkpointer.outcomes(), reporter) or saved_step
        if result.flags.save_failed:
            _report(checkpointer.abort(), reporter)
        if is_last or stopping.is_over(progress) or result.flags.stop:
            _save_and_wait(checkpointer, progress, reporter)
            if result.flags.stop:
                return LoopResult(progress=progress)
        elif result.flags.drain and snapshots is not None:
            snapshots.snapshotter.begin(progress)
            snapshots.snapshotter.finish()
            return LoopResult(progress=progress, is_drained=True)
        elif result.flags.save:
            checkpointer.begin(progress)
            saved_at, is_save_due = time.monotonic(), False
        elif result.flags.snapshot and snapshots is not None:
            snapshots.snapshotter.begin(progress)
        if snapshots is not None:
            _adjust(snapshots.interval, result, step=step, step_s=step_s, reporter=reporter)
    if stopping.is_over(progress):
        reporter.event(stopping.event(progress))
    is_whole = progress.step >= inputs.total_steps or stopping.is_over(progress)
    if is_whole and training.ema is not None and inputs.held_out.rows.num_rows:
        engine.state.swap_average()
        evaluate(engine, inputs.held_out, step=progress.step, weights="ema", reporter=reporter)
        engine.state.swap_average()
    return LoopResult(progress=progress)


def evaluate(engine: Engine, held_out: HeldOutBatches, *, step: int, weights: str, reporter: Reporter) -> Evaluated:
    """Measure the loss and the metrics of the objective over all held-out rows; collective."""
    began = time.monotonic()
    means = engine.evaluate(held_out)
    evaluated = Evaluated(
        step=step,
        loss=means.pop("loss"),
        metrics=means,
        num_tokens=held_out.num_targets,
        weights=weights,
        seconds=time.monotonic() - began,
    )
    reporter.event(evaluated)
    return evaluated


def _requests(
    reporter: Reporter, checkpointer: AsyncCheckpointer, *, save: bool, snapshot: bool, evaluate: bool
) -> StepControl:
    """Collect the control requests of this rank just before the all-reduce that ends a step."""
    return StepControl(
        stop=reporter.should_stop(),
        drain=reporter.should_drain(),
        save=save and not checkpointer.is_busy,
        snapshot=snapshot,
        evaluate=evaluate,
        save_failed=checkpointer.has_failed,
    )


def _adjust(
    interval: SnapshotInterval, result: StepResult, *, step: int, step_s: float, reporter: Reporter
) -> None:
    """Update the snapshot interval from the measured cost; step times differ between ranks, rank 0 decides."""
    if result.flags.save or result.flags.snapshot:
        interval.record_snapshot(step)
    if interval.update(step_s=step_s, cost_s=result.snapshot_cost_s):
        reporter.event(SnapshotIntervalChanged(every=interval.every, seconds=interval.cost_s, share=interval.share))


def _save_and_wait(checkpointer: AsyncCheckpointer, progress: Progress, reporter: Reporter) -> None:
    """Save and wait until it is written; try twice, since the writer process may be killed and is restarted.

    Raises: CheckpointError on every rank if it cannot be written.
    """
    for _ in range(2):
        checkpointer.begin(progress)
        outcomes = checkpointer.finish()
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
    """Report checkpoints; a failure in the middle of a run is no error. Returns: the newest step saved, or 0."""
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
    """The error of the first step that is not finite: the weights are unusable from here on."""
    kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "no checkpoint was written yet"
    return DivergedError(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, at a learning rate of {lr:.3g}; "
        f"{kept}. Lower training.optimizer.lr, raise schedule.warmup_steps, or set optimizer.grad_clip"
    )
