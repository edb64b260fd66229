"""The results of a search: its JSON record, `report.html` and `best.yaml`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from forge.config.overrides import search_of
from forge.fs import write_atomic
from forge.report.html_report import REPORT, write_report
from forge.runs.reader import RunSummary, read_run
from forge.runs.trials import Trial, TrialTable, trial_id
from forge.search.best_job import best_job_yaml
from forge.search.importance import importances

BEST = "best.yaml"
"""In the search's folder: the job with the best trial's values."""


def search_record(run: RunSummary) -> dict[str, Any]:
    """Return a search with all its trials as JSON; numbers that are not finite become None.

    Raises: JobFileError if the run is not a search.
    """
    search, table = search_of(run.plan.job), TrialTable(run.events)
    best = table.best(search.direction)
    return {
        "search_id": run.run_id,
        "folder": str(run.folder),
        "status": run.status,
        "metric": search.metric,
        "mode": search.direction,
        "num_trials": run.plan.search.num_trials if run.plan.search else len(table.trials),
        "counts": table.counts(),
        "best": best and _result(best, search_id=run.run_id),
        "importances": importances(search, table),
        "usd": (run.newest("CostUpdated") or {}).get("usd"),
        "seconds": run.goodput().wall_s,
        "trials": [_record(trial, search_id=run.run_id) for trial in table.trials.values()],
        "report": _existing(run.folder / REPORT),
        "best_yaml": _existing(run.folder / BEST),
    }


def write_results(folder: Path) -> None:
    """Write `report.html` and, if a trial reported a value, `best.yaml` into the folder of a search.

    Raises: ArgumentError or PlanError if the folder holds no readable run; JobFileError if it is not a search, or
        if the job does not accept the best trial's values, in which case `report.html` is written all the same.
    """
    write_report(folder)
    run = read_run(folder)
    text = best_job_yaml(run.plan, TrialTable(run.events), search_id=run.run_id)
    if text is not None:
        write_atomic(folder / BEST, text)


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
