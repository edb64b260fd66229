"""A ledger in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.report.text import bucket_rows, change_rows, goodput_facts, goodput_line
from forge.runs.goodput import GoodputReport, goodput_of
from tests.support.runs import History


def eventful() -> GoodputReport:
    history = History()
    history.start()
    history.form(6.0)
    history.step(1, 2.0)
    history.nodes = ("a",)
    history.change("loss", reason="node b lost")
    history.form(1.0)
    history.step(1, 2.0)
    history.step(2, 4.0, gap_s=1.0)
    return goodput_of(history.events, history.steps, now=None)


def test_the_line_says_what_changes_cost_the_dearest_first() -> None:
    told = goodput_line(eventful(), width=200)
    assert told == "goodput 25%  1 node  1 change  starting 44%  training 38%  repeated 12%  other 6%"


@given(st.integers(-1, 100))
def test_the_line_fits_and_ends_with_a_whole_figure(width: int) -> None:
    whole, told = goodput_line(eventful(), width=200), goodput_line(eventful(), width=width)
    assert len(told) <= max(0, width)
    assert not told or (whole + "  ").startswith(told + "  ")


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_of_a_run_on_one_machine_without_a_change_there_is_nothing_to_say(num_steps: int) -> None:
    history = History()
    history.nodes = ("a",)
    history.start()
    history.form(1.0)
    for step in range(1, num_steps + 1):
        history.step(step, 1.0)
    assert goodput_line(goodput_of(history.events, history.steps, now=None), width=80) == ""


def test_the_table_of_buckets_has_those_that_are_not_empty_and_the_whole() -> None:
    assert bucket_rows(eventful()) == [
        ["training", "6.0", "37.5%"],
        ["repeated", "2.0", "12.5%"],
        ["starting", "7.0", "43.8%"],
        ["other", "1.0", "6.2%"],
        ["wall time", "16.0", "100.0%"],
    ]


def test_the_facts_name_how_often_what_happened() -> None:
    facts = dict(goodput_facts(eventful()))
    assert facts["goodput"] == "25.0% (2 new steps of 2s in 16s)"
    assert facts["changes"] == "1 change, 1 preemption, 0 failures, 1 step repeated"


def test_a_change_is_a_row_with_when_why_and_how_long() -> None:
    assert change_rows(eventful(), started=1_000_000.0, limit=10) == [["8s", "loss", "2 → 1", "3s", "node b lost"]]
    assert change_rows(eventful(), started=2_000_000.0, limit=10)[0][0] == "0ms"
