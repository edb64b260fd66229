"""Compare runs: what each reached, how fast and at what cost, and what differs between their jobs.

Reads only the folders of the runs. A comparison is a table of runs as columns, JSON, or a page with their loss
curves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.config.compare import JobDifference, job_differences
from forge.errors import ArgumentError
from forge.fs import write_atomic
from forge.objective.registry import OBJECTIVES, Direction
from forge.plan.plan import written_job
from forge.report.page import render_page
from forge.report.run_figures import curves_figure
from forge.report.run_series import read_series
from forge.report.text import number
from forge.report.trial_rows import shown
from forge.runs.goodput_report import GoodputReport
from forge.runs.reader import RunSummary, iter_metrics
from forge.runs.scores import newest_scores, read_scores
from forge.units import format_count, format_duration

MAX_RUNS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedValue:
    """One row of the table: a quantity of every run."""

    name: str
    direction: Direction | None
    """What is better; None where neither is."""
    values: tuple[float | None, ...]
    """None where it is unknown or not finite."""
    shape: str = ".4f"
    """How a value is shown: a format, `duration` or `count`."""

    @property
    def best(self) -> tuple[bool, ...]:
        """Of each run whether its value is the best; none is if all are equal."""
        known = {value for value in self.values if value is not None}
        if self.direction is None or len(known) < 2:
            return tuple(False for _ in self.values)
        best = min(known) if self.direction == "min" else max(known)
        return tuple(value == best for value in self.values)

    def shown(self) -> list[str]:
        """The values as text."""
        return [_shown(value, self.shape) for value in self.values]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Several runs side by side."""

    runs: tuple[RunSummary, ...]
    values: tuple[ComparedValue, ...]
    differences: tuple[JobDifference, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The ids of the runs; their folders if two have the same id."""
        ids = [run.run_id for run in self.runs]
        return ids if len(set(ids)) == len(ids) else [str(run.folder) for run in self.runs]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "runs": [{"run_id": run.run_id, "folder": str(run.folder), "status": run.status} for run in self.runs],
            "values": [
                {"name": row.name, "direction": row.direction, "values": list(row.values)} for row in self.values
            ],
            "differences": {one.key: dict(zip(self.names, one.values, strict=True)) for one in self.differences},
            "notes": list(self.notes),
        }


def compare_runs(runs: Sequence[RunSummary]) -> RunComparison:
    """Compare runs in the order given. Raises: ArgumentError for a search, for one run, or for more than 20."""
    if not 2 <= len(runs) <= MAX_RUNS:
        raise ArgumentError(f"2 to {MAX_RUNS} runs can be compared, not {len(runs)}")
    for run in runs:
        if run.plan.search is not None:
            raise ArgumentError(
                f"{run.run_id} is a search; compare its trials, whose ids are {run.run_id}-0001, ..."
            )
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise ArgumentError("a run cannot be compared with itself; name other runs")
    columns = [_quantities(run) for run in runs]
    rows = dict.fromkeys(name for column in columns for name in column)
    return RunComparison(
        runs=tuple(runs),
        values=tuple(_row(name, columns) for name in rows),
        differences=tuple(job_differences([written_job(run.plan) for run in runs])),
        notes=tuple(_notes(runs)),
    )


def comparison_rows(comparison: RunComparison) -> list[list[str]]:
    """Rows of the quantity and its value for each run; the best has a star."""
    rows = [["status", *(run.status for run in comparison.runs)]]
    for row in comparison.values:
        cells = [f"{text}{' *' if best else ''}" for text, best in zip(row.shown(), row.best, strict=True)]
        rows.append([row.name, *cells])
    return rows


def difference_rows(comparison: RunComparison) -> list[list[str]]:
    """Rows of a key of the job and its value in each."""
    return [
        [one.key, *("-" if value is None else shown(value) for value in one.values)]
        for one in comparison.differences
    ]


def write_comparison(comparison: RunComparison, *, path: Path) -> None:
    """Write a page with the loss curves and the tables. Raises: ArgumentError if it cannot be written."""
    runs = dict(zip(comparison.names, comparison.runs, strict=True))
    series = {name: read_series(iter_metrics(run.folder)) for name, run in runs.items()}
    starts = {name: run.started for name, run in runs.items()}
    page = render_page(
        "compare.html.j2",
        figures=[
            curves_figure(series, key="loss", title="Loss over steps"),
            curves_figure(series, key="hours", title="Loss over time", since=starts),
        ],
        comparison=comparison,
        rows=comparison_rows(comparison),
        differences=difference_rows(comparison),
        is_running=any(run.status == "running" for run in comparison.runs),
    )
    try:
        write_atomic(path, page)
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantity:
    value: float | None
    direction: Direction | None = None
    shape: str = ".4f"


def _row(name: str, columns: Sequence[Mapping[str, _Quantity]]) -> ComparedValue:
    first = next(column[name] for column in columns if name in column)
    values = (column[name].value if name in column else None for column in columns)
    return ComparedValue(
        name=name,
        direction=first.direction,
        shape=first.shape,
        values=tuple(value if value is not None and math.isfinite(value) else None for value in values),
    )


def _quantities(run: RunSummary) -> dict[str, _Quantity]:
    """What is compared of a run, by name: results, then speed, then cost."""
    goodput, last = run.goodput(), run.last
    return {
        "parameters": _Quantity(value=run.plan.model.num_parameters, shape="count"),
        "steps": _Quantity(value=run.step, shape=",d"),
        "tokens": _Quantity(value=last.get("train/tokens"), shape="count"),
        "train/loss": _Quantity(value=last.get("train/loss"), direction="min"),
        **_evaluated(run),
        **{
            f"{score.task}/{name}": _Quantity(value=value.value, direction=_direction(value.direction), shape=".4g")
            for score in newest_scores(read_scores(run.folder))
            for name, value in score.values.items()
        },
        **_speed(run, goodput),
        **_cost(run),
    }


def _evaluated(run: RunSummary) -> dict[str, _Quantity]:
    event = run.newest("Evaluated", weights="current")
    if event is None:
        return {}
    objective = OBJECTIVES.get(run.plan.job.training.objective)
    directions: dict[str, Direction] = {"loss": "min", "perplexity": "min"}
    directions |= objective.metrics if objective is not None else {}
    return {
        f"eval/{name}": _Quantity(value=value, direction=directions.get(name))
        for name, value in {"loss": event["loss"], **event["metrics"]}.items()
    }


def _speed(run: RunSummary, goodput: GoodputReport) -> dict[str, _Quantity]:
    return {
        "tokens/s": _Quantity(value=goodput.tokens_per_s, direction="max", shape=",.0f"),
        "MFU": _Quantity(value=goodput.mfu, direction="max", shape=".1%"),
        "wall time": _Quantity(value=goodput.wall_s, shape="duration"),
        "goodput": _Quantity(value=goodput.goodput, direction="max", shape=".1%"),
        "changes": _Quantity(value=goodput.num_changes, shape=",d"),
        "preemptions": _Quantity(value=goodput.num_preemptions, shape=",d"),
        "peak memory, GiB": _Quantity(value=run.last.get("memory/peak_gib"), direction="min", shape=".2f"),
    }


def _cost(run: RunSummary) -> dict[str, _Quantity]:
    cost, tokens = run.newest("CostUpdated"), run.last.get("train/tokens")
    if cost is None or cost["usd"] is None:
        return {}
    found = {"USD": _Quantity(value=cost["usd"], direction="min", shape=",.2f")}
    if tokens:
        found["USD per 1M tokens"] = _Quantity(value=cost["usd"] / tokens * 1e6, direction="min", shape=",.4g")
    return found


def _notes(runs: Sequence[RunSummary]) -> Iterator[str]:
    """What a reader must know before comparing losses."""
    if len({run.plan.corpus.digest for run in runs}) > 1:
        yield "the runs have other corpora, so their held-out losses are of other texts"
    if len({run.plan.corpus.vocab_size for run in runs}) > 1:
        yield "the vocabularies differ in size, so losses per token are not comparable; bits per byte of a task are"
    if len({run.plan.job.training.objective for run in runs}) > 1:
        yield "the objectives differ, so the losses are not comparable"
    if len({run.step for run in runs}) > 1:
        yield "the runs have not trained the same number of steps"


def _direction(name: str) -> Direction | None:
    return "min" if name == "min" else "max" if name == "max" else None


def _shown(value: float | None, shape: str) -> str:
    if value is None:
        return "-"
    match shape:
        case "duration":
            return format_duration(value)
        case "count":
            return format_count(value)
        case ",d":
            return f"{int(value):,}"
    return number(value, shape)
