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
from forge.config.training import EarlyStoppingSpec
from forge.errors import RunError
from forge.events import EarlyStopped, Evaluated
from forge.objective.registry import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopping:
    """The rule by which a run stops early; without a spec it never does."""

    spec: EarlyStoppingSpec | None
    directions: Mapping[str, Direction]
    """Of what the objective reports besides the loss, by name."""

    def observe(self, evaluated: Evaluated, *, progress: Progress) -> Progress:
        """Return the progress after an evaluation; one of other weights than the metric's does not change it.

        Raises: RunError if it has no value of the metric.
        """
        if (evaluated.weights == "ema") is not self._is_of_average:
            return progress
        value, best = self._value(evaluated), progress.best_value
        progress = replace(
            progress,
            metric=self._metric,
            metric_value=value if math.isfinite(value) else None,
            metric_direction="min" if self._sign < 0 else "max",
        )
        if self.spec is None:
            return progress
        gain = math.inf if best is None else (value - best) * self._sign
        if math.isfinite(value) and gain > self.spec.min_delta:
            return replace(progress, best_value=value, best_step=evaluated.step, num_evaluations_since_best=0)
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
    def _name(self) -> str:
        return self._metric.removeprefix("eval/ema_" if self._is_of_average else "eval/")

    @property
    def _is_of_average(self) -> bool:
        own = self._metric.removeprefix("eval/")
        return own.startswith("ema_") and own not in self.directions

    @property
    def _sign(self) -> int:
        return -1 if self._name.partition("/")[0] == "loss" or self.directions[self._name] == "min" else 1

    def _value(self, evaluated: Evaluated) -> float:
        values = {"loss": evaluated.loss, **evaluated.metrics}
        if self._name not in values:
            raise RunError(
                f"training.early_stopping: the evaluation of step {evaluated.step} has no eval/{self._name}; the "
                f"objective reported {', '.join(values)}"
            )
        return values[self._name]
