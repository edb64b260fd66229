"""Which values a trial has: a function of the seed, its number and what is known of those before."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from forge.config.job import JobSpec
from forge.runs.trials import TrialTable
from forge.search.suggest import suggest
from tests.support.jobs import tiny_job
from tests.support.searches import LR, WARMUP, SearchHistory

SPACE: dict[str, Any] = {
    LR: {"loguniform": [1e-4, 1e-1]},
    WARMUP: {"int": [0, 4]},
    "training.zero.stage": {"choice": [0, 1]},
}
OPTUNA = {"kind": "optuna", "startup_trials": 3, "seed": 5}


def job_of(*, space: dict[str, Any] = SPACE, lr: float = 10.0, **search: Any) -> JobSpec:
    return tiny_job(training__optimizer={"lr": lr}, search={"space": space, "searcher": OPTUNA} | search)


def loss_of(values: dict[str, Any]) -> float:
    return (math.log10(values[LR]) + 2.5) ** 2


def searched(job: JobSpec, *, num_trials: int, at_once: int, chance: random.Random) -> TrialTable:
    """A search whose trials end in any order in which they can."""
    history, running, number = SearchHistory(), [], 1
    while number <= num_trials or running:
        values = None
        if number <= num_trials and len(running) < at_once:
            values = suggest(job, number=number, table=history.table, at_once=at_once)
        if values is not None:
            running.append(history.suggest(values))
            history.start(running[-1])
            number += 1
            continue
        trial = running.pop(chance.randrange(len(running)))
        history.report(trial, 6, loss_of(history.table.trials[trial].values))
        history.end(trial)
    return history.table


def test_suggest__no_scheduler__does_not_depend_on_the_order_of_ends() -> None:
    job = job_of()
    found = [
        {n: t.values for n, t in searched(job, num_trials=12, at_once=3, chance=random.Random(seed)).trials.items()}
        for seed in range(3)
    ]
    assert found[0] == found[1] == found[2]
    assert len({repr(values) for values in found[0].values()}) == 12


def test_suggest__no_scheduler__waits_only_for_trials_it_learns_from() -> None:
    job, history = job_of(), SearchHistory()
    for number in range(1, 4):  # at random
        values = suggest(job, number=number, table=history.table, at_once=2)
        assert values is not None
        history.suggest(values)
    for trial in (1, 3):
        history.report(trial, 6, 1.0)
        history.end(trial)
    assert suggest(job, number=4, table=history.table, at_once=2) is None
    assert suggest(job, number=4, table=history.table, at_once=3) is not None  # the second need not be over
    history.report(2, 6, 1.0)
    history.end(2)
    assert suggest(job, number=4, table=history.table, at_once=2) is not None


def test_suggest__scheduler__learns_from_all_that_are_over_without_waiting() -> None:
    job, history = job_of(scheduler={"kind": "asha"}), SearchHistory()
    for number in range(1, 6):
        values = suggest(job, number=number, table=history.table, at_once=2)
        assert values is not None
        history.suggest(values)


def test_suggest__any_trial__values_are_in_the_space() -> None:
    for trial in searched(job_of(), num_trials=20, at_once=2, chance=random.Random(0)).trials.values():
        assert 1e-4 <= trial.values[LR] <= 1e-1
        assert isinstance(trial.values[WARMUP], int)
        assert 0 <= trial.values[WARMUP] <= 4
        assert trial.values["training.zero.stage"] in (0, 1)


def test_suggest__optuna__approaches_the_optimum() -> None:
    def late_loss(searcher: dict[str, Any]) -> float:
        found = 0.0
        for seed in range(6):
            job = job_of(searcher=searcher | {"seed": seed})
            trials = searched(job, num_trials=24, at_once=2, chance=random.Random(0)).trials
            found += sum(loss_of(trials[number].values) for number in range(9, 25))
        return found

    assert late_loss({"kind": "optuna", "startup_trials": 8}) < 0.75 * late_loss({"kind": "random"})


def test_suggest__another_seed__other_values() -> None:
    one, other = (
        suggest(job_of(searcher=OPTUNA | {"seed": seed}), number=2, table=TrialTable(), at_once=1)
        for seed in (1, 2)
    )
    assert one != other


def test_suggest__first_trial__has_the_jobs_own_values() -> None:
    own = {LR: 0.01, WARMUP: 2, "training.zero.stage": 1}  # as the tiny job has them
    space = SPACE | {"training.zero.stage": {"choice": [1, 2]}}
    assert suggest(job_of(space=space, lr=0.01), number=1, table=TrialTable(), at_once=1) == own


def test_suggest__diverged_or_failed_trials__are_avoided() -> None:
    job, history = job_of(), SearchHistory()
    chance = random.Random(3)
    for _ in range(12):
        lr = 10 ** chance.uniform(-4, -1)
        is_wild = lr > 1e-2
        status = "diverged" if is_wild else "finished"
        history.run({LR: lr, WARMUP: 0, "training.zero.stage": 1}, [] if is_wild else [1.0], status=status)
    values = suggest(job, number=13, table=history.table, at_once=1)
    assert values is not None
    assert values[LR] < 3e-2


@pytest.mark.parametrize("number", [1, 4, 6])
def test_suggest__grid__last_key_changes_fastest(number: int) -> None:
    space = {LR: {"grid": [0.1, 0.2]}, WARMUP: {"grid": [0, 1, 2]}}
    job = job_of(space=space, searcher={"kind": "grid"})
    expected = {LR: [0.1, 0.2][(number - 1) // 3], WARMUP: (number - 1) % 3}
    assert suggest(job, number=number, table=TrialTable(), at_once=2) == expected
