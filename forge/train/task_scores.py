"""Scores of the tasks of `evaluate`, between two steps: the interface of what computes them.

The loop calls it with the weights of a step and gets values under their keys in `metrics.jsonl`, equal on every
rank. `forge.evaluate.in_training` implements it, on a copy of the model: training reads nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from forge.config.evaluate import METRIC_PREFIX
from forge.events import Reporter, TasksScored
from forge.objective.registry import Direction
from forge.plan.plan import Plan

_IMPLEMENTATION = "forge.evaluate.in_training"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """The tasks' metrics at one step."""

    values: Mapping[str, float] = field(default_factory=dict)
    """By `evaluate/TASK/METRIC`; those that are defined."""
    directions: Mapping[str, Direction] = field(default_factory=dict)
    """Whether less or more is better, by the same keys; also of those that are not defined."""
    num_examples: int = 0


class TaskScorer(Protocol):
    """Scores weights in the tasks of a job."""

    def is_due(self, step: int) -> bool:
        """Whether the tasks make an evaluation due after a step."""

    def is_scored(self, step: int, *, is_last: bool) -> bool:
        """Whether the tasks are scored in an evaluation after a step."""

    def score(self, weights: Iterator[tuple[str, Tensor]], *, step: int) -> TaskScores:
        """Score the model with these weights; collective.

        Args:
            weights: whole parameters and buffers by their names in the model, in the same order on every rank.

        Raises: DataError, JobFileError, ArgumentError, the same on every rank.
        """


def score_tasks(
    tasks: TaskScorer, weights: Iterator[tuple[str, Tensor]], *, step: int, reporter: Reporter
) -> TaskScores:
    """Score weights in the tasks of a job, and report the event; collective."""
    began = time.monotonic()
    scores = tasks.score(weights, step=step)
    reporter.event(
        TasksScored(
            step=step,
            scores={key.removeprefix(METRIC_PREFIX): value for key, value in scores.values.items()},
            num_examples=scores.num_examples,
            seconds=time.monotonic() - began,
        )
    )
    return scores


def build_scorer(plan: Plan, *, device: torch.device, on_progress: Callable[[], None]) -> TaskScorer | None:
    """Build what scores the tasks of a job between its steps; None if it has none.

    The implementation needs `forge.inference`, which is above this package, so it is imported by its name.

    Args:
        on_progress: called while a rank works or waits for others.
    """
    if not plan.tasks or plan.job.evaluate is None or not plan.job.evaluate.is_in_training:
        return None
    scorer: TaskScorer = import_module(_IMPLEMENTATION).TrainingTasks(plan, device=device, on_progress=on_progress)
    return scorer
