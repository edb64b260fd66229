"""Number of trials, and how many run at once."""

from __future__ import annotations

from typing import Any

import pytest

from forge.errors import PlanError
from forge.plan.search import SearchPlan, plan_search
from tests.support.jobs import tiny_job

LR = "training.optimizer.lr"


def plan(*, workers: str = "1", num_slots: int = 4, **search: Any) -> SearchPlan:
    job = tiny_job(resources__workers=workers, search={"space": {LR: {"loguniform": [1e-4, 1e-2]}}} | search)
    assert job.search is not None
    return plan_search(job, job.search, num_slots=num_slots)


@pytest.mark.parametrize(
    ("workers", "num_slots", "at_once"), [("1", 4, 4), ("2", 4, 2), ("2..4", 5, 2), ("3..4", 4, 1), ("1", 99, 16)]
)
def test_plan_search__auto__runs_as_many_trials_as_fit(workers: str, num_slots: int, at_once: int) -> None:
    assert plan(workers=workers, num_slots=num_slots).trials_at_once == at_once


def test_plan_search__given_trials_at_once__is_used() -> None:
    assert plan(trials_at_once=3).trials_at_once == 3


@pytest.mark.parametrize(
    ("workers", "search", "message"),
    [
        ("5..8", {}, "at least 5 workers, and the cluster has room for 4"),
        ("2", {"trials_at_once": 3}, "with 2 workers each that is 6 workers, and the cluster has room for 4"),
        ("1", {"max_trials": 1, "scheduler": {"kind": "pbt", "interval_steps": 2}}, "must be at least 2"),
    ],
)
def test_plan_search__too_many_workers__is_rejected_with_numbers(
    workers: str, search: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan(workers=workers, **search)


@pytest.mark.parametrize(("max_trials", "expected"), [(None, 6), (4, 4), (100, 6)])
def test_plan_search__grid__has_a_trial_per_combination(max_trials: int | None, expected: int) -> None:
    space = {LR: {"grid": [1e-3, 1e-2]}, "training.optimizer.beta2": {"grid": [0.9, 0.95, 0.99]}}
    found = plan(space=space, searcher={"kind": "grid"}, max_trials=max_trials)
    assert (found.num_trials, found.num_combinations) == (expected, 6)
    assert found.is_whole_grid == (expected == 6)
