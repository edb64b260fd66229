"""Ends a run whose evaluations no longer improve: `training.early_stopping`.

Its metric, by default `eval/loss`, is also what the best checkpoints are chosen by.

The best value and the number of evaluations since then are in `Progress`, so that snapshots and checkpoints carry
them, and a run that is resized or resumed stops at the step at which it would have stopped anyway. Every rank
decides from the same all-reduced values, so that all stop at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from forge.checkpoint.manifest import Progress
from forge.config.evaluate import METRIC_PREFIX
from forge.config.training import EarlyStoppingSpec
from forge.errors import RunError
from forge.events import EarlyStopped, Evaluated
from forge.objective.registry import Direction
from forge.train.task_scores import TaskScores


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopping:
    """The rule by which a run stops early; without a spec it never does."""

    spec: EarlyStoppingSpec | None
    directions: Mapping[str, Direction]
    """Of what the objective reports besides the loss, by name."""

    def observe(
        self, evaluated: Evaluated | None, *, progress: Progress, tasks: TaskScores | None = None
    ) -> Progress:
        """Return the progress after an evaluation; one that does not measure the metric does not change it.

        Args:
            evaluated: None if no sequence is held out.
            tasks: the scores of the same step; None if none were computed.

        Raises: RunError if it has no value of the metric.
        """
        found = self._found(evaluated, tasks=tasks)
        if found is None:
            return progress
        (value, direction), best = found, progress.best_value
        progress = replace(
            progress,
            metric=self._metric,
            metric_value=value if math.isfinite(value) else None,
            metric_direction=direction,
        )
        if self.spec is None:
            return progress
        gain = math.inf if best is None else (value - best) * (-1 if direction == "min" else 1)
        if math.isfinite(value) and gain > self.spec.min_delta:
            return replace(progress, best_value=value, best_step=progress.step, num_evaluations_since_best=0)
        return replace(progress, num_evaluations_since_best=progress.num_evaluations_since_best + 1)

    def is_over(self, progress: Progress) -> bool:
        """Whether the run stops at this progress."""
        return self.spec is not None and progress.num_evaluations_since_best >= self.spec.patience

    def event(self, progress: Progress) -> EarlyStopped:
        """The event of a run that stops at this progress."""
        assert self.spec is not None, "a run without early stopping does not stop early"
        return EarlyStopped(
            step=progress.step, metric=self.spec.metric, best=progress.best_value, best_step=progress.best_step
        )

    @property
    def _metric(self) -> str:
        return "eval/loss" if self.spec is None else self.spec.metric

    @property
    def _is_of_average(self) -> bool:
        own = self._metric.removeprefix("eval/")
        return own.startswith("ema_") and own not in self.directions

    def _found(self, evaluated: Evaluated | None, *, tasks: TaskScores | None) -> tuple[float, Direction] | None:
        """The value of the metric and its direction; None if this evaluation does not measure it."""
        metric = self._metric
        if metric.startswith(METRIC_PREFIX):
            if tasks is None:
                return None
            if metric not in tasks.directions:
                raise RunError(
                    f"training.early_stopping: the tasks have no {metric}; they have {', '.join(tasks.directions)}"
                )
            return tasks.values.get(metric, math.nan), tasks.directions[metric]
        if evaluated is None or (evaluated.weights == "ema") is not self._is_of_average:
            return None
        name = metric.removeprefix("eval/ema_" if self._is_of_average else "eval/")
        values = {"loss": evaluated.loss, **evaluated.metrics}
        if name not in values:
            raise RunError(
                f"training.early_stopping: the evaluation of step {evaluated.step} has no eval/{name}; the "
                f"objective reported {', '.join(values)}"
            )
        return values[name], "min" if name.partition("/")[0] == "loss" else self.directions[name]
