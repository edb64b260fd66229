"""A search as a whole: its record in JSON, and the files that are made of its events at its end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from forge.config.overrides import search_of
from forge.report.html_report import PAGE, wall_seconds, write_page
from forge.runs.reader import RunSummary, read_run
from forge.runs.trials import Trial, TrialTable, trial_id
from forge.search.best_job import best_job_yaml
from forge.search.importance import importances

BEST = "best.yaml"
"""In the search's folder: the job with the values found."""


def search_record(run: RunSummary) -> dict[str, Any]:
    """A search as JSON, with all of its trials; what is not finite is None.

    Raises: JobFileError if the run is no search.
    """
    search, book = search_of(run.plan.job), TrialTable(run.events)
    best = book.best(search.mode)
    return {
        "search_id": run.run_id,
        "folder": str(run.folder),
        "status": run.status,
        "metric": search.metric,
        "mode": search.mode,
        "num_trials": run.plan.search.num_trials if run.plan.search else len(book.trials),
        "counts": book.counts(),
        "best": best and _result(best, search_id=run.run_id),
        "importances": importances(search, book),
        "usd": (run.newest("CostUpdated") or {}).get("usd"),
        "seconds": wall_seconds(run),
        "trials": [_record(trial, search_id=run.run_id) for trial in book.trials.values()],
        "report": _existing(run.folder / PAGE),
        "best_yaml": _existing(run.folder / BEST),
    }


def write_results(folder: Path) -> None:
    """Write the page and, if a trial was judged, `best.yaml` into the folder of a search.

    Raises: ArgumentError or PlanError if the folder holds no run that can be read; JobFileError if it is no search,
        or if its job cannot have the values that were found, in which case the page is there all the same.
    """
    write_page(folder)
    run = read_run(folder)
    text = best_job_yaml(run.plan, TrialTable(run.events), search_id=run.run_id)
    if text is None:
        return
    draft = folder / f"{BEST}.draft"
    draft.write_text(text, encoding="utf-8")
    draft.replace(folder / BEST)


def _result(trial: Trial, *, search_id: str) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "trial_id": trial_id(search_id, trial.number),
        "value": _finite(trial.value),
        "step": trial.step,
        "values": trial.values,
    }


def _record(trial: Trial, *, search_id: str) -> dict[str, Any]:
    return _result(trial, search_id=search_id) | {
        "status": trial.status,
        "reports": [[step, _finite(value)] for step, value in trial.reports],
        "moves": [[step, donor] for step, donor in trial.moves],
        "start_s": trial.start_s,
        "seconds": trial.seconds,
        "reason": trial.reason,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _existing(path: Path) -> str | None:
    return str(path) if path.is_file() else None
