"""One table of several models: models as rows, metrics as columns, as papers print it.

Every value has its 95 % interval. Each model is compared with the first one by the paired bootstrap over the
examples that both were asked; where these differ, there is no p-value and a note says why. The p-values are of
single comparisons: they are not corrected for the number of models and metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forge.config.compare import JobDifference, job_differences
from forge.config.task import TaskSpec
from forge.evaluate.bootstrap import MetricScore, p_values, resample
from forge.evaluate.metrics.base import Metric, ScoredExample
from forge.evaluate.metrics.build import build_metrics
from forge.objective.registry import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutputs:
    """What one model has answered to one task."""

    ids: tuple[str, ...]
    """Of the examples, each with the digest of what was asked."""
    examples: tuple[ScoredExample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A model and its outputs."""

    name: str
    outputs: Mapping[str, TaskOutputs]
    """By the name of the task."""
    job: Mapping[str, Any] | None = None
    """The job that trained it; None for a folder of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreColumn:
    """A value of a metric of a task."""

    task: str
    value_name: str
    direction: Direction
    signature: str
    num_examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCell:
    """The score of a model in a column."""

    score: float
    low: float
    high: float
    p_value: float | None
    """Of the difference from the first model; None for that one, and where the examples differ."""
    is_best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The table, what differs between the jobs, and what a reader must know."""

    models: tuple[str, ...]
    columns: tuple[ScoreColumn, ...]
    rows: tuple[tuple[ScoreCell | None, ...], ...]
    """Of each model, a cell for each column; None if it has no outputs of the task."""
    differences: tuple[JobDifference, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values; NaN and infinite scores are null."""
        cells = [[None if cell is None else _finite(asdict(cell)) for cell in row] for row in self.rows]
        rows = [{"model": model, "cells": row} for model, row in zip(self.models, cells, strict=True)]
        columns = [asdict(column) for column in self.columns]
        differing = {one.key: dict(zip(self.models, one.values, strict=True)) for one in self.differences}
        return {"columns": columns, "rows": rows, "differences": differing, "notes": list(self.notes)}


def compare(models: Sequence[EvaluatedModel], *, tasks: Sequence[TaskSpec]) -> Comparison:
    """Score the outputs of models and compare each with the first.

    Args:
        tasks: in the order of the columns.

    Raises: DataError for outputs that a metric cannot read; ArgumentError for a missing package.
    """
    columns: list[ScoreColumn] = []
    cells: list[list[ScoreCell | None]] = []
    notes: list[str] = []
    for task in tasks:
        outputs = [model.outputs.get(task.name) for model in models]
        notes += _notes(models, outputs, task=task.name)
        everything = [example for one in outputs if one is not None for example in one.examples]
        for metric in build_metrics(task.metrics, examples=everything, label_kind=task.label_kind).values():
            scored = _scored(metric, outputs, seed=task.seed)
            for name, direction in metric.directions.items():
                columns.append(_column(task.name, name, scored))
                cells.append(_cells(name, scored, direction=direction))
    return Comparison(
        models=tuple(model.name for model in models),
        columns=tuple(columns),
        rows=tuple(zip(*cells, strict=True)) if cells else tuple(() for _ in models),
        differences=tuple(job_differences([model.job for model in models])),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """The values of a metric of one model; no scores if it has no outputs."""

    scores: Mapping[str, MetricScore]
    p_values: Mapping[str, float]


def _notes(models: Sequence[EvaluatedModel], outputs: Sequence[TaskOutputs | None], *, task: str) -> Iterator[str]:
    first = outputs[0]
    for model, one in zip(models[1:], outputs[1:], strict=True):
        if one is not None and first is not None and one.ids != first.ids:
            names = f"{models[0].name} and {model.name}"
            yield f"{task}: {names} were asked different examples, so they have no p-value"


def _scored(metric: Metric, outputs: Sequence[TaskOutputs | None], *, seed: int) -> list[_Scored]:
    """The scores of every model, and the p-values of those that were asked what the first was."""
    found = [None if one is None else resample(metric, one.examples, seed=seed) for one in outputs]
    first, reference = outputs[0], found[0]
    scored = []
    for number, (one, resampled) in enumerate(zip(outputs, found, strict=True)):
        compared = {}
        if number and resampled and reference and one and first and one.ids == first.ids:
            compared = p_values(reference, resampled)
        scored.append(_Scored(scores=resampled.scores if resampled else {}, p_values=compared))
    return scored


def _column(task: str, name: str, scored: Sequence[_Scored]) -> ScoreColumn:
    given = [one.scores[name] for one in scored if one.scores]
    return ScoreColumn(
        task=task,
        value_name=name,
        direction=given[0].direction,
        signature=given[0].signature,
        num_examples=max(score.num_examples for score in given),
    )


def _cells(name: str, scored: Sequence[_Scored], *, direction: Direction) -> list[ScoreCell | None]:
    values = [one.scores[name].value for one in scored if one.scores]
    best = (max if direction == "max" else min)((v for v in values if not math.isnan(v)), default=math.nan)
    return [
        ScoreCell(
            score=one.scores[name].value,
            low=one.scores[name].low,
            high=one.scores[name].high,
            p_value=one.p_values.get(name),
            is_best=len(scored) > 1 and one.scores[name].value == best,
        )
        if one.scores
        else None
        for one in scored
    ]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
