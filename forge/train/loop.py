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
from forge.checkpoint.space import NO_SPACE
from forge.config.resources import CheckpointSpec
from forge.config.training import TrainingSpec
from forge.data.loader import HeldOutBatches, TrainBatches
from forge.errors import CheckpointError, DivergedError
from forge.events import (
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Event,
    Reporter,
    SnapshotIntervalChanged,
    StepMetrics,
)
from forge.plan.schedule import FormerLength, ScheduleSteps
from forge.train.async_checkpoint import AsyncCheckpointer, CheckpointWritten, Outcome, SaveFailed
from forge.train.best_checkpoint import BestCheckpoints
from forge.train.checkpoint_interval import CheckpointInterval
from forge.train.early_stopping import EarlyStopping
from forge.train.engine import Engine, StepControl, StepResult
from forge.train.evaluation import evaluate
from forge.train.lr_schedule import learning_rate
from forge.train.snapshot_interval import SnapshotInterval
from forge.train.snapshotter import Snapshotter
from forge.train.task_scores import TaskScorer, TaskScores, score_tasks
from forge.units import format_duration

# How often, and how far apart, the last checkpoint of a run is tried while the disk is full.
_SPACE_TRIES = 60
_SPACE_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """The batches and settings of one worker's loop, and its last step."""

    training: TrainingSpec
    checkpoint: CheckpointSpec
    checkpoint_interval: CheckpointInterval
    total_steps: int
    schedule_steps: ScheduleSteps
    former_lengths: tuple[FormerLength, ...] = ()
    """Of a run that was resumed with another length; the schedule of its earlier steps."""
    pause_at: int | None
    """The step after which to stop with a checkpoint, before the last one."""
    batches: TrainBatches
    held_out: HeldOutBatches
    tasks: TaskScorer | None = None
    """Scores the tasks of `evaluate` between steps; None if they are not."""
    flops_per_token: int
    peak_flops: float

    def schedule_of(self, step: int) -> ScheduleSteps:
        """Return the lengths that the learning rate of a step follows."""
        former = (length.schedule for length in self.former_lengths if step <= length.until_step)
        return next(former, self.schedule_steps)

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
    loop = _TrainLoop(
        engine, inputs, start=start, checkpointer=checkpointer, snapshots=snapshots, reporter=reporter
    )
    return loop.run(on_started=on_started)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step that has been made: what it was given, and what the engine returned."""

    number: int
    learning_rate: float
    num_tokens: int
    seconds: float
    result: StepResult


class _TrainLoop:
    """The progress of one worker, and when it last saved and evaluated."""

    def __init__(
        self,
        engine: Engine,
        inputs: TrainInputs,
        *,
        start: Progress,
        checkpointer: AsyncCheckpointer,
        snapshots: SnapshotPolicy | None,
        reporter: Reporter,
    ) -> None:
        self._engine, self._inputs, self._reporter = engine, inputs, reporter
        self._checkpointer, self._snapshots = checkpointer, snapshots
        self._stopping = EarlyStopping(spec=inputs.training.early_stopping, directions=engine.metric_directions)
        self._progress, self._saved_step = start, start.step
        self._saved_at = self._evaluated_at = time.monotonic()
        self._is_save_due = False
        self._best = BestCheckpoints(url=checkpointer.url, count=inputs.checkpoint.keep_best or 0)

    @property
    def _is_over(self) -> bool:
        return self._progress.step >= self._inputs.last_step or self._stopping.is_over(self._progress)

    def run(self, *, on_started: Callable[[], None]) -> LoopResult:
        """Train until the last step or a request to end; `on_started` is called after the first step."""
        if self._is_over:
            on_started()
        elif self._best.is_due(self._progress):  # the generation that evaluated this step ended before it was saved
            self._checkpointer.begin(self._progress, is_best=True)
        start = self._progress
        while not self._is_over:
            step = self._make_step()
            if self._progress is start:
                on_started()
            self._require_finite(step)
            num_tokens = self._progress.num_tokens + step.num_tokens
            self._progress = replace(
                self._progress, step=step.number, num_tokens=num_tokens, metric="", metric_value=None
            )
            found, scores = self._evaluate_if_requested(step)
            self._report_step(step, found, scores=scores)
            if (result := self._save_as_requested(step)) is not None:
                return result
            if not self._is_over:
                self._adjust_intervals(step)
        self._end()
        return LoopResult(progress=self._progress)

    def _make_step(self) -> _Step:
        inputs, training = self._inputs, self._inputs.training
        number, began = self._progress.step + 1, time.monotonic()
        is_last = number == inputs.last_step
        # A checkpoint that is due while another is being written begins when that one is committed.
        self._is_save_due |= inputs.checkpoint_interval.is_due(step=number, since_s=began - self._saved_at)
        is_evaluation_due = training.evaluate_every.is_due(
            step=number, seconds_since_last=began - self._evaluated_at
        )
        is_evaluation_due |= inputs.tasks is not None and inputs.tasks.is_due(number)
        lr = learning_rate(
            training.schedule, step=number, lengths=inputs.schedule_of(number), peak=training.optimizer.lr
        )
        totals = inputs.batches.totals(number)
        snapshots = self._snapshots
        result = self._engine.step(
            number,
            inputs.batches.of_step(number),
            total_weight=totals.weight,
            lr=lr,
            requests=partial(
                self._requests,
                save=is_last or self._is_save_due,
                snapshot=snapshots is not None and snapshots.interval.is_due(number),
                evaluate=is_last or is_evaluation_due,
            ),
            snapshot_cost_s=snapshots.snapshotter.take_cost_s if snapshots else lambda: 0.0,
        )
        seconds = time.monotonic() - began
        return _Step(number=number, learning_rate=lr, num_tokens=totals.num_targets, seconds=seconds, result=result)

    def _requests(self, *, save: bool, snapshot: bool, evaluate: bool) -> StepControl:
        """Collect the control requests of this rank just before the all-reduce that ends a step."""
        return StepControl(
            stop=self._reporter.should_stop(),
            drain=self._reporter.should_drain(),
            save=save and not self._checkpointer.is_busy,
            snapshot=snapshot,
            evaluate=evaluate,
            save_failed=self._checkpointer.has_failed,
        )

    def _require_finite(self, step: _Step) -> None:
        """Raises: DivergedError if the weights are unusable after this step; an earlier checkpoint is completed."""
        loss, grad_norm = step.result.loss, step.result.grad_norm
        if math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm >= 0:
            return
        self._report(self._checkpointer.finish())
        saved = self._saved_step
        kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was written yet"
        raise DivergedError(
            f"step {step.number}: the loss is {loss} and the gradient norm {grad_norm}, at a learning rate of "
            f"{step.learning_rate:.3g}; {kept}. Lower training.optimizer.lr, raise schedule.warmup, or set "
            "optimizer.grad_clip"
        )

    def _evaluate_if_requested(self, step: _Step) -> tuple[Evaluated | None, TaskScores | None]:
        if not step.result.flags.evaluate:
            return None, None
        found = None
        if self._inputs.held_out.rows.num_rows:
            found = evaluate(
                self._engine, self._inputs.held_out, step=step.number, weights="current", reporter=self._reporter
            )
        scores = None
        tasks, is_last = self._inputs.tasks, step.number == self._inputs.last_step
        if tasks is not None and tasks.is_scored(step.number, is_last=is_last):
            weights = self._engine.state.whole_weights()
            scores = score_tasks(tasks, weights, step=step.number, reporter=self._reporter)
        self._evaluated_at = time.monotonic()
        self._progress = self._stopping.observe(found, progress=self._progress, tasks=scores)
        return found, scores

    def _evaluate_average(self, *, is_evaluated: bool) -> dict[str, float]:
        """Measure the averaged (EMA) weights after the run's last step, or with `ema.evaluate: always` at each
        evaluation.

        Args:
            is_evaluated: whether the weights themselves were measured after this step.

        Returns: the metrics under their keys in `metrics.jsonl`; empty if they are not measured.
        """
        inputs, progress, state = self._inputs, self._progress, self._engine.state
        ema, is_last = inputs.training.ema, progress.step >= inputs.total_steps or self._stopping.is_over(progress)
        if ema is None or not inputs.held_out.rows.num_rows:
            return {}
        if not is_last and not (is_evaluated and ema.evaluate == "always"):
            return {}
        state.swap_average()
        found = evaluate(self._engine, inputs.held_out, step=progress.step, weights="ema", reporter=self._reporter)
        state.swap_average()
        if is_evaluated:
            self._progress = self._stopping.observe(found, progress=self._progress)
        return {f"eval/ema_{name}": value for name, value in {"loss": found.loss, **found.metrics}.items()}

    def _report_step(self, step: _Step, found: Evaluated | None, *, scores: TaskScores | None) -> None:
        result, inputs = step.result, self._inputs
        extra = {f"train/{name}": value for name, value in result.metrics.items()}
        if found is not None:
            extra |= {f"eval/{name}": value for name, value in found.metrics.items()}
        extra |= scores.values if scores is not None else {}
        extra |= self._evaluate_average(is_evaluated=found is not None)
        self._reporter.step(
            StepMetrics(
                step=step.number,
                loss=result.loss,
                learning_rate=step.learning_rate,
                grad_norm=result.grad_norm,
                num_tokens=self._progress.num_tokens,
                tokens_per_s=step.num_tokens / step.seconds,
                mfu=inputs.flops_per_token * step.num_tokens / step.seconds / inputs.peak_flops,
                step_s=step.seconds,
                peak_memory_gib=result.peak_memory_gib,
                world_size=inputs.batches.plan.world_size,
                held_out_loss=found.loss if found is not None else None,
                extra=extra,
            )
        )

    def _save_as_requested(self, step: _Step) -> LoopResult | None:
        """Begin the checkpoint or the snapshot that all ranks agreed on; a result ends the loop here."""
        flags, checkpointer, snapshots = step.result.flags, self._checkpointer, self._snapshots
        self._report(checkpointer.outcomes())
        if flags.save_failed:
            self._report(checkpointer.abort())
        is_best = self._best.is_due(self._progress)
        if self._is_over or flags.stop:
            self._save_and_wait(is_best=is_best)
            if flags.stop:
                return LoopResult(progress=self._progress)
        elif flags.drain and snapshots is not None:
            snapshots.snapshotter.begin(self._progress)
            snapshots.snapshotter.finish()
            return LoopResult(progress=self._progress, is_drained=True)
        elif flags.save or is_best:
            if is_best:  # it cannot be saved later
                self._report(checkpointer.finish())
            checkpointer.begin(self._progress, is_best=is_best)
            self._saved_at, self._is_save_due = time.monotonic(), False
        elif flags.snapshot and snapshots is not None:
            snapshots.snapshotter.begin(self._progress)
        return None

    def _save_and_wait(self, *, is_best: bool) -> None:
        """Save and wait until it is written; try twice, since the writer process may be killed and is restarted.

        If the disk is full, try until `_SPACE_TRIES`: the state of a whole run must not be lost for that.

        Raises: CheckpointError on every rank if it cannot be written.
        """
        step, num_tries = self._progress.step, 0
        while (failed := self._try_to_save(is_best=is_best)) is not None:
            num_tries += 1
            is_full = NO_SPACE in failed.reason
            if num_tries >= (_SPACE_TRIES if is_full else 2):
                break
            if is_full:
                if num_tries == 1:
                    waits = f"the run waits {format_duration(_SPACE_TRIES * _SPACE_RETRY_S)} for space"
                    self._report([replace(failed, reason=f"{failed.reason}; {waits}")])
                self._checkpointer.pause(_SPACE_RETRY_S)
        else:
            return
        raise CheckpointError(f"the checkpoint of step {step} could not be written by {failed.reason}")

    def _try_to_save(self, *, is_best: bool) -> SaveFailed | None:
        """Save and wait until it is written. Returns: why it could not be written, the same on every rank."""
        self._checkpointer.begin(self._progress, is_best=is_best)
        outcomes = self._checkpointer.finish()
        failed = [
            outcome
            for outcome in outcomes
            if isinstance(outcome, SaveFailed) and outcome.step == self._progress.step
        ]
        self._report(outcome for outcome in outcomes if outcome not in failed)
        return failed[0] if failed else None

    def _report(self, outcomes: Iterable[Outcome]) -> None:
        """Report checkpoints; a failure in the middle of a run is no error."""
        for outcome in outcomes:
            self._reporter.event(_outcome_event(outcome))
            if isinstance(outcome, CheckpointWritten):
                self._saved_step = max(self._saved_step, outcome.step)
                self._inputs.checkpoint_interval.record_checkpoint(outcome)
            else:
                self._best.forget()

    def _adjust_intervals(self, step: _Step) -> None:
        """Update both intervals from the measured costs; step times differ between ranks, rank 0 decides."""
        result, checkpoints = step.result, self._inputs.checkpoint_interval
        if self._snapshots is not None:
            interval = self._snapshots.interval
            if result.flags.save or result.flags.snapshot:
                interval.record_snapshot(step.number)
            if interval.update(step_s=step.seconds, cost_s=result.snapshot_cost_s):
                self._reporter.event(
                    SnapshotIntervalChanged(every=interval.every, seconds=interval.cost_s, share=interval.share)
                )
            checkpoints.record_snapshot_cost(interval.cost_s)
        if (changed := checkpoints.update()) is not None:
            self._reporter.event(changed)

    def _end(self) -> None:
        """Report an early stop."""
        if self._stopping.is_over(self._progress):
            self._reporter.event(self._stopping.event(self._progress))


def _outcome_event(outcome: Outcome) -> Event:
    if isinstance(outcome, CheckpointWritten):
        return CheckpointSaved(
            step=outcome.step,
            folder=outcome.folder,
            size_bytes=outcome.size_bytes,
            seconds=outcome.seconds,
            stall_s=outcome.stall_s,
            removed=outcome.removed,
            is_best=outcome.is_best,
        )
    return CheckpointFailed(step=outcome.step, reason=f"the checkpoint could not be written by {outcome.reason}")
