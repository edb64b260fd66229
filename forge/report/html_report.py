"""Write `report.html` of a search: its best trial, figures and a table of all trials.

Reads only the search's folder, whether the search is running or not. `forge.report.page` says why the page loads
nothing, and `forge.report.figures` escapes the text of the figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from forge.config.overrides import search_of
from forge.fs import write_atomic
from forge.report.figures import build_figures, labels
from forge.report.page import STATUS_COLORS, PageTile, render_page
from forge.report.search_summary import SearchSummary, search_summary
from forge.report.text import number
from forge.runs.reader import failure_of, read_run
from forge.runs.trials import Trial
from forge.search.importance import importances
from forge.units import format_duration

REPORT = "report.html"
"""In the search's folder."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a search.

    Returns: the page.
    Raises: ArgumentError or PlanError if the folder holds no readable run; JobFileError if it is not a search.
    """
    run = read_run(folder)
    search_of(run.plan.job)
    path = folder / REPORT
    write_atomic(path, _render(search_summary(run)))
    return path


def _render(summary: SearchSummary) -> str:
    run, search, table = summary.run, summary.search, summary.table
    return render_page(
        "search.html.j2",
        filters={"notes": _notes},
        run=run,
        is_running=run.status == "running",
        headline=search_headline(summary),
        failure=failure_of(run),
        tiles=list(search_tiles(summary)),
        metric=search.metric,
        best=summary.best,
        best_note=_best_note(summary),
        figures=list(build_figures(search, table, importances(search, table))),
        names=labels(search),
        trials=list(table.trials.values()),
    )


def search_headline(summary: SearchSummary) -> str:
    """Describe the metric, the searcher and the scheduler in a few words."""
    search = summary.search
    words = [f"{search.metric}, {'less' if search.direction == 'min' else 'more'} is better"]
    words.append(f"searcher {search.searcher.kind}")
    words += [f"scheduler {search.scheduler.kind}"] if search.scheduler.kind != "none" else []
    words += ["trials of a proxy job"] if search.proxy else []
    return " · ".join(words)


def search_tiles(summary: SearchSummary) -> Iterator[PageTile]:
    """The numbers at the top of the page of a search."""
    trials, counts, best = list(summary.table.trials.values()), summary.table.counts(), summary.best
    progress = f"{len(trials)} of {summary.num_trials}" if len(trials) < summary.num_trials else f"{len(trials)}"
    by_status = ", ".join(f"{counts[status]} {status}" for status in STATUS_COLORS if status in counts)
    yield PageTile(name="trials", value=progress, note=by_status or "none yet")
    if best is not None:
        yield PageTile(
            name=f"best {summary.search.metric}", value=number(best.value, ".5g"), note=f"trial {best.number}"
        )
    plan = summary.run.plan.search
    at_once = f"{plan.trials_at_once} at once" if plan else ""
    yield PageTile(name="wall time", value=format_duration(summary.run.goodput().wall_s), note=at_once)
    starts = [trial.start_s for trial in trials if trial.start_s is not None]
    if starts:
        num_warm = sum(trial.is_warm for trial in trials if trial.start_s is not None)
        note = f"median; {num_warm} of {len(starts)} warm"
        yield PageTile(name="start of a trial", value=format_duration(statistics.median(starts)), note=note)
    cost = summary.run.newest("CostUpdated")
    if cost is not None:
        yield PageTile(name="cost", value=f"{number(cost.get('usd'), ',.2f')} USD", note="all machines together")


def _best_note(summary: SearchSummary) -> str:
    best, search = summary.best, summary.search
    if best is None:
        return "No trial has reported a value." if summary.table.trials else "No trial has started."
    of_total = f" of {best.total_steps}" if best.total_steps else ""
    value = f"{search.metric} {number(best.value, '.6g')}"
    notes = [f"Trial {best.number}, {best.status}: {value} at step {best.step}{of_total}."]
    notes += [f"It continued {_exploits(best)}, with other values."] if best.moves else []
    notes += ["Its values were found with a proxy of the job."] if search.proxy else []
    if summary.run.status != "running":
        notes.append("best.yaml, in the same folder, is the job with these values.")
    return " ".join(notes)


def _notes(trial: Trial) -> str:
    return "; ".join(filter(None, [trial.reason, _exploits(trial)]))


def _exploits(trial: Trial) -> str:
    return "; ".join(f"from trial {donor} at step {step}" for step, donor in trial.moves)
