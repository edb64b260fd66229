"""Folders of searches as their driver writes them, without trials that train."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.config.dump import dump_job
from forge.config.overrides import first_values, search_of, trial_job
from forge.events import (
    Event,
    RunStarted,
    TrialEnded,
    TrialReported,
    TrialStarted,
    TrialSuggested,
    event_to_record,
)
from forge.plan.plan import Plan, make_plan, plan_to_json
from forge.plan.search import plan_search
from forge.runs.trials import trial_folder
from tests.support.jobs import CPU, UNPREPARED, tiny_facts, tiny_job
from tests.support.runs import make_run

BEGAN = 1_000_000.0
LR = "training.optimizer.lr"
WARMUP = "training.schedule.warmup"
SEARCH: dict[str, Any] = {
    "space": {LR: {"loguniform": [1e-4, 1e-2]}, WARMUP: {"int": [0, 4]}},
    "max_trials": 4,
    "searcher": {"kind": "random"},
    "scheduler": {"kind": "asha", "grace_steps": 2},
}


def search_plan(*, num_slots: int = 4, **changes: Any) -> Plan:
    """The plan of a search over the tiny job; `changes` are keys of `search:`."""
    job = tiny_job(search=SEARCH | changes)
    search = search_of(job)
    plan = make_plan(trial_job(job, first_values(search)), model=tiny_facts(), corpus=UNPREPARED, hardware=CPU)
    return replace(plan, job=job, search=plan_search(job, search, num_slots=num_slots))


def make_search(
    root: Path,
    name: str = "tiny-0101-000000-5ea1",
    *,
    events: Iterable[Event] = (),
    trial_runs: Iterable[int] = (),
    **changes: Any,
) -> Path:
    """The folder of a search with `events` a second apart; the trials in `trial_runs` have run folders."""
    folder = root / name
    (folder / "logs").mkdir(parents=True)
    plan = search_plan(**changes)
    (folder / "job.yaml").write_text(dump_job(plan.job))
    (folder / "plan.json").write_text(plan_to_json(plan))
    recorded = [RunStarted(run_id=name, total_steps=plan.total_steps, resumed_from_step=0), *events]
    records = [{"time": BEGAN + at} | event_to_record(event) for at, event in enumerate(recorded)]
    (folder / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for number in trial_runs:
        trial = Path(trial_folder(str(folder), number))
        make_run(trial.parent, trial.name)
    return folder


def suggested(trial: int, **changes: Any) -> TrialSuggested:
    """A trial whose values follow from its number."""
    values: Mapping[str, Any] = {LR: trial / 1000, WARMUP: trial} | changes
    return TrialSuggested(trial=trial, values=values)


def begun(trial: int, *, values: Mapping[int, float] | None = None) -> list[Event]:
    """A running trial with its objective values by step."""
    reports = [reported(trial, step=step, value=value) for step, value in (values or {}).items()]
    return [
        suggested(trial),
        TrialStarted(trial=trial, total_steps=6, seconds=1.2, is_warm=trial > 1),
        *reports,
    ]


def reported(trial: int, *, step: int, value: float) -> TrialReported:
    """A trial reports an objective value."""
    metrics = {"step": step, "train/loss": value, "eval/loss": value, "eval/perplexity": 2 * value}
    return TrialReported(trial=trial, step=step, value=value, metrics=metrics)


def ended(
    trial: int, *, step: int = 6, value: float | None = None, status: str = "finished", reason: str = ""
) -> list[Event]:
    """A trial that ran and ended."""
    values = {} if value is None else {step: value}
    end = TrialEnded(trial=trial, status=status, step=step, value=value, reason=reason)
    return [*begun(trial, values=values), end]
