"""What a search's events add up to."""

from __future__ import annotations

import math

import pytest

from forge.runs.trials import TrialTable, seconds_left, trial_folder, trial_id
from tests.support.searches import LR, SearchHistory


def of_values(*reported: float) -> TrialTable:
    history = SearchHistory()
    for value in reported:
        history.run({LR: 1e-3}, [value])
    return history.table


def test_table__one_trial__from_suggestion_to_end() -> None:
    history = SearchHistory()
    trial = history.suggest({LR: 1e-3})
    assert history.table.trials[1].status == "waiting"
    history.start(trial, total_steps=6, seconds=2.5)
    history.report(trial, 3, 2.5)
    running = history.table.trials[1]
    assert (running.status, running.step, running.value, running.total_steps) == ("running", 3, 2.5, 6)
    assert (running.start_s, running.is_over, running.seconds) == (2.5, False, None)
    history.report(trial, 6, 2.0)
    history.end(trial)
    over = history.table.trials[1]
    assert (over.status, over.reports, over.is_over, over.seconds) == ("finished", [(3, 2.5), (6, 2.0)], True, 2.5)


def test_table__repeated_report__counts_once() -> None:
    history = SearchHistory()
    trial = history.suggest({LR: 1e-3})
    for step, value in ((2, 3.0), (4, 2.5), (2, 9.0), (4, 9.0), (6, 2.0)):
        history.report(trial, step, value)
    assert history.table.trials[1].reports == [(2, 3.0), (4, 2.5), (6, 2.0)]


def test_table__resumed_trial__keeps_its_first_start() -> None:
    history = SearchHistory()
    trial = history.suggest({LR: 1e-3})
    history.start(trial, seconds=2.0)
    history.start(trial, seconds=40.0)
    assert history.table.trials[1].start_s == 2.0


def test_table__null_value__nan() -> None:
    value = of_values(math.nan).trials[1].value
    assert value is not None and math.isnan(value)


def test_table__other_records__are_ignored() -> None:
    table = TrialTable(
        [
            {"event": "RunStarted", "time": 1.0, "run_id": "r"},
            {"event": "TrialFlown", "time": 1.0, "trial": 1},
            {"event": "TrialEnded", "time": 1.0, "trial": 7, "status": "finished", "reason": ""},
        ]
    )
    assert not table.trials and table.best("min") is None and not table.best_so_far("min") and not table.counts()


@pytest.mark.parametrize(("mode", "number"), [("min", 2), ("max", 3)])
def test_best__mode__first_among_equals(mode: str, number: int) -> None:
    best = of_values(2.0, 1.0, 3.0, 1.0, 3.0, math.inf, math.nan).best("min" if mode == "min" else "max")
    assert best is not None and best.number == number


def test_best__prefers_finished_trials() -> None:
    history = SearchHistory()
    history.run({}, [0.5], status="stopped")
    history.run({}, [0.1], status="diverged")
    history.run({}, [0.1], status="failed")
    best = history.table.best("min")
    assert best is not None and best.number == 1
    history.run({}, [0.9])
    best = history.table.best("min")
    assert best is not None and best.number == 4


def test_best_so_far__order_of_endings() -> None:
    history = SearchHistory()
    for value in (3.0, 1.0, 2.0, 0.1, 4.0):
        history.report(history.suggest({}), 1, value)
    for trial, status in ((3, "finished"), (4, "failed"), (5, "finished"), (2, "stopped")):
        history.end(trial, status=status)
    assert history.table.best_so_far("min") == [(1, 2.0), (3, 2.0), (4, 1.0)]
    assert history.table.best_so_far("max") == [(1, 2.0), (3, 4.0), (4, 4.0)]
    assert history.table.counts() == {"waiting": 1, "stopped": 1, "finished": 2, "failed": 1}


def test_table__exploit__takes_the_values() -> None:
    history = SearchHistory()
    for value in (1e-3, 1e-2):
        history.suggest({LR: value})
    history.move(1, donor=2, step=4, values={LR: 8e-3})
    history.move(1, donor=2, step=8, values={LR: 9e-3})
    trial = history.table.trials[1]
    assert (trial.values, trial.moves) == ({LR: 9e-3}, [(4, 2), (8, 2)])
    assert history.table.trials[2].values == {LR: 1e-2}


def test_seconds_left__from_ended_trials() -> None:
    assert seconds_left(TrialTable(), num_trials=4, at_once=2) is None
    assert seconds_left(of_values(1.0), num_trials=4, at_once=2) == pytest.approx(2 * 1.5)


def test_trial_folder__in_the_search_folder() -> None:
    assert trial_folder("runs/tune-a-0101", 7) == "runs/tune-a-0101/trials/" + trial_id("tune-a-0101", 7)
    assert trial_id("tune-a-0101", 7) == "tune-a-0101-0007"
