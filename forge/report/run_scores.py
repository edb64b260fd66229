"""The scores of tasks in `evaluation.jsonl` as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forge.report.text import number
from forge.runs.scores import TaskScore


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One metric of one task."""

    task: str
    metric: str
    value: str
    interval: str
    """Bounds of the 95 % bootstrap interval."""
    better: str
    num_examples: int
    step: str
    """Of the checkpoint."""
    note: str
    """Contamination and records that could not be used."""


def score_rows(scores: Sequence[TaskScore]) -> list[ScoreRow]:
    """Rows of task, metric and value with its 95 % interval, in the order of the scores."""
    return [
        ScoreRow(
            task=score.task,
            metric=name,
            value=number(value.value, ".4g"),
            interval="-" if value.low is None or value.high is None else f"{value.low:.4g} to {value.high:.4g}",
            better="less" if value.direction == "min" else "more",
            num_examples=value.num_examples,
            step="-" if score.step is None else f"{score.step:,}{' (ema)' if score.ema else ''}",
            note=_note(score),
        )
        for score in scores
        for name, value in score.values.items()
    ]


def _note(score: TaskScore) -> str:
    notes = [f"{score.num_skipped:,} records that cannot be used"] if score.num_skipped else []
    if score.contamination is None:
        return "; ".join([*notes, "contamination not checked"])
    found = [f"{name} {number(share, '.2%')}" for name, share in score.contamination.items()]
    return "; ".join([*notes, f"in the training data: {', '.join(found)}"] if found else notes)
