"""Write `report.html` of a search: its best trial, figures and a table of all trials.

Reads only the search's folder, whether the search is running or not. `forge.report.page` says why the page loads
nothing, and `forge.report.figures` escapes the text of the figures.
"""

from __future__ import annotations

from pathlib import Path

from forge.config.overrides import search_of
from forge.fs import write_atomic
from forge.report.figures import build_figures, labels
from forge.report.page import render_page
from forge.report.run_report import alert_context
from forge.report.search_summary import SearchSummary, search_summary
from forge.report.search_tiles import search_headline, search_tiles
from forge.report.text import number
from forge.runs.reader import failure_of, read_run
from forge.runs.trials import Trial
from forge.search.importance import importances

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
        alerts=alert_context(run),
    )


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
