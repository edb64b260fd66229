"""The trials of a search as a table, and as lines of describer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.config.overrides import search_of
from forge.events import Event, RunStopped, TrialEnded, TrialExploited, TrialReported, TrialStarted, event_to_record
from forge.report.search_record import search_record
from forge.report.search_summary import outcome_facts, search_summary
from forge.report.text import plan_facts, search_facts
from forge.report.trial_event_text import TrialEventDescriber
from forge.report.trial_rows import bars, fit_table, format_value, select_trials, short_names, shown, trial_rows
from forge.runs.reader import read_run
from forge.runs.trials import TrialTable
from tests.support.jobs import tiny_plan
from tests.support.tuning import BEGAN, LR, WARMUP, begun, ended, make_search, search_plan, suggested

TRIALS = [
    *ended(1, value=5.0),
    *ended(2, value=4.0),
    *ended(3, step=2, value=8.0, status="stopped"),
    *begun(4, values={2: 4.5}),
    suggested(5),
]


def records(events: list[Event]) -> list[dict[str, Any]]:
    return [{"time": BEGAN + at} | event_to_record(event) for at, event in enumerate(events)]


def drawn(*, width: int) -> list[str]:
    table = TrialTable(records(TRIALS))
    trials = select_trials(table, mode="min", room=9)
    return fit_table(
        "eval/loss", trial_rows(trials, now=BEGAN + 60, total_steps=6, best=table.best("min")), width=width
    )


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ([LR, WARMUP], ["lr", "warmup"]),
        (["a.b.lr", "a.c.lr", "name"], ["b.lr", "c.lr", "name"]),
        (["x.lr", "lr"], ["x.lr", "lr"]),
        ([], []),
    ],
)
def test_short_names__fewest_distinct_parts(keys: list[str], names: list[str]) -> None:
    assert list(short_names(keys).values()) == names


def test_select_trials__running_then_best_then_newest() -> None:
    table = TrialTable(records(TRIALS))
    assert [trial.number for trial in select_trials(table, mode="min", room=9)] == [4, 2, 5, 3, 1]
    assert [trial.number for trial in select_trials(table, mode="max", room=3)] == [4, 1, 5]
    assert select_trials(table, mode="min", room=-1) == []


def test_fit_table__wide__has_everything() -> None:
    assert drawn(width=80) == [
        "trial  status    step  eval/loss  values             time",
        "    4  running    2/6     4.5000  lr=0.004 warmup=4   48s",
        "   *2  finished   6/6     4.0000  lr=0.002 warmup=2    3s",
        "    5  waiting    0/6          -  lr=0.005 warmup=5   45s",
        "    3  stopped    2/6     8.0000  lr=0.003 warmup=3    3s",
        "    1  finished   6/6     5.0000  lr=0.001 warmup=1    3s",
    ]


@pytest.mark.parametrize(
    ("width", "head", "line"),
    [
        (50, "trial  status    step  eval/loss  values", "   *2  finished   6/6     4.0000  lr=0.002 warmup…"),
        (36, " # status   step   loss values", "*2 finished  6/6 4.0000 lr=0.002 wa…"),
        (28, " # status   step   loss", "*2 finished  6/6 4.0000"),
        (10, " # status…", "*2 finish…"),
    ],
)
def test_fit_table__narrow__leaves_out_columns(width: int, head: str, line: str) -> None:
    lines = drawn(width=width)
    assert (lines[0], lines[2]) == (head, line)


@given(st.integers(0, 100))
def test_fit_table__any_width__fits(width: int) -> None:
    assert max(map(len, drawn(width=width))) <= width


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0012345, "0.001234"),
        (3, "3"),
        (True, "true"),
        (None, "null"),
        ("adamw\x1b[2J", "adamw\\x1b[2J"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_shown__values__short_and_printable(value: Any, text: str) -> None:
    assert shown(value) == text


def test_format_value__keeps_distinguishing_digits() -> None:
    assert [format_value(value) for value in (5.25, 123456.0, 1.25e-5, float("nan"), None, 0.0)] == [
        "5.2500", "1.235e+05", "1.25e-05", "-", "-", "0",
    ]  # fmt: skip


def test_bars__proportional_and_sorted() -> None:
    shares = {WARMUP: 0.25, LR: 0.5, "x": float("nan"), "y": 0.0}
    assert bars(shares, width=4) == [
        ["lr", "50%", "████"], ["warmup", "25%", "██"], ["y", "0%", ""], ["x", "-", ""],
    ]  # fmt: skip
    assert bars({}) == []


def test_describe__trial_event__one_line() -> None:
    describer = TrialEventDescriber(search_of(search_plan().job))
    again = TrialStarted(trial=1, total_steps=6, seconds=0.3, is_warm=True)
    events = [
        *begun(1, values={2: 5.25}),
        again,
        TrialReported(trial=1, step=4, value=float("nan"), metrics={}),
        TrialExploited(trial=1, donor=3, step=4, values={LR: 0.002}),
        TrialEnded(trial=1, status="stopped", step=4, value=5.0, reason="asha"),
        TrialEnded(trial=1, status="failed", step=4, value=None, reason="rank 0\ndied"),
        TrialEnded(trial=9, status="failed", step=4, value=None),
    ]
    assert [line for record in records(events) if (line := describer.describe(record))] == [
        "trial 1 started in 1.2s: lr=0.001 warmup=1",
        "trial 1 step 2 eval/loss 5.2500",
        "trial 1 resumed after 300ms: lr=0.001 warmup=1",
        "trial 1 step 4 eval/loss is not a number",
        "trial 1 continues from trial 3 at step 4: lr=0.002",
        "trial 1 stopped by asha at step 4, eval/loss 5.0000",
        "trial 1 failed at step 4: rank 0\\ndied",
    ]


class TestThePlan:
    def test_search_facts__job_without_search__empty(self) -> None:
        assert search_facts(tiny_plan()) == []

    @pytest.mark.parametrize(
        ("changes", "name", "text"),
        [
            ({}, "trials", "4, 4 at once with 1..4 workers each (room for 4 workers)"),
            ({"max_trials": 9}, "trials", "9, 4 at once with 1..4 workers each (room for 4 workers)"),
            ({}, "searcher", "random, seed 1"),
            ({"searcher": {}}, "searcher", "optuna, seed 1, the first 10 at random"),
            ({}, "scheduler", "asha, at step 2 and at every 3 times as many steps the best 1 of 3 continues"),
            ({"scheduler": {}}, "scheduler", "none, every trial runs to its end"),
            (
                {"scheduler": {"kind": "median"}},
                "scheduler",
                "median, from the first evaluation on a trial worse than the median of the others is stopped",
            ),
            (
                {"scheduler": {"kind": "pbt", "interval_steps": 2}},
                "scheduler",
                "pbt, every 2 steps the worst 25% continue from the best 25%",
            ),
            ({"metric": "speed/mfu", "mode": "max"}, "metric", "speed/mfu, more is better"),
            ({"max_hours": 0.5, "max_usd": 20}, "limits", "0.5 hours, 20 USD"),
            ({"proxy": {"training.total_steps": 5}}, "proxy", "training.total_steps=5 in every trial"),
        ],
    )
    def test_search_facts__each_part__one_line(self, changes: dict[str, Any], name: str, text: str) -> None:
        assert dict(search_facts(search_plan(**changes)))[name] == text

    def test_plan_facts__searched_value_in_the_space__is_that_of_the_job_and_says_so(self) -> None:
        own = search_plan().job.training.optimizer.lr
        training = dict(plan_facts(search_plan()))["training"]
        assert f"lr {own:g} (searched) (" in training
        assert "(searched) steps of warm-up" in training
        assert training.count("searched") == 2

    def test_outcome_facts__resumed_search__wall_time_without_the_time_between(self, tmp_path: Path) -> None:
        folder = make_search(tmp_path, events=[*ended(1, value=1.0), RunStopped(step=0)])
        lines = (folder / "events.jsonl").read_text().splitlines()
        later = [json.loads(line) for line in lines]
        later = [event | {"time": event["time"] + 1000.0} for event in later if event["event"] != "TrialSuggested"]
        (folder / "events.jsonl").write_text("\n".join([*lines, *map(json.dumps, later)]) + "\n")
        run = read_run(folder)
        session_s = json.loads(lines[-1])["time"] - json.loads(lines[0])["time"]
        assert dict(outcome_facts(search_summary(run)))["wall time"] == f"{2 * session_s:.0f}s"
        assert search_record(run)["seconds"] == 2 * session_s

    @pytest.mark.parametrize(("max_trials", "text"), [(3, "3 of 6 combinations"), (None, "all 6 combinations")])
    def test_search_facts__grid__counts_combinations(self, max_trials: int | None, text: str) -> None:
        space = {LR: {"grid": [0.1, 0.2, 0.3]}, WARMUP: {"grid": [0, 1]}}
        plan = search_plan(space=space, searcher={"kind": "grid"}, max_trials=max_trials)
        assert dict(search_facts(plan))["trials"].startswith(f"{text}, ")
