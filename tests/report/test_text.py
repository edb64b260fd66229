"""The goodput report as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.events import NodeJoined, NodeLeft
from forge.report.text import (
    bucket_rows,
    change_rows,
    evaluation_text,
    goodput_facts,
    goodput_line,
    headline,
    number,
    plan_facts,
    replay_facts,
    summary_facts,
)
from forge.runs.goodput import goodput_of
from forge.runs.goodput_report import GoodputReport
from forge.runs.reader import read_run
from tests.support.jobs import UNPREPARED, tiny_plan
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


def test_goodput_line__changes__largest_bucket_first() -> None:
    line = goodput_line(eventful(), width=200)
    assert line == "goodput 25%  1 node  1 change  starting 44%  training 38%  repeated 12%  other 6%"


@given(st.integers(-1, 100))
def test_goodput_line__width__ends_with_a_whole_number(width: int) -> None:
    whole, line = goodput_line(eventful(), width=200), goodput_line(eventful(), width=width)
    assert len(line) <= max(0, width)
    assert not line or (whole + "  ").startswith(line + "  ")


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_goodput_line__one_node_without_changes__empty(num_steps: int) -> None:
    history = History()
    history.nodes = ("a",)
    history.start()
    history.form(1.0)
    for step in range(1, num_steps + 1):
        history.step(step, 1.0)
    assert goodput_line(goodput_of(history.events, history.steps, now=None), width=80) == ""


def test_bucket_rows__nonempty_buckets_and_total() -> None:
    assert bucket_rows(eventful()) == [
        ["training", "6.0", "37.5%"],
        ["repeated", "2.0", "12.5%"],
        ["starting", "7.0", "43.8%"],
        ["other", "1.0", "6.2%"],
        ["wall time", "16.0", "100.0%"],
    ]


def test_goodput_facts__counts_changes() -> None:
    facts = dict(goodput_facts(eventful()))
    assert facts["goodput"] == "25.0% (2 new steps of 2s in 16s)"
    assert facts["changes"] == "1 change, 1 preemption, 0 failures, 1 step repeated"


def test_replay_facts__nodes_lost_before_they_joined__counts_agree_with_the_goodput_report() -> None:
    history = History()
    history.start()
    for node in ("a", "b"):
        history.record(NodeJoined(node=node, host="10.0.0.1", num_slots=1, agent_pid=1))
    history.form(1.0)
    history.step(1, 1.0)
    history.record(NodeLeft(node="b", reason="lost"))
    history.change("loss", reason="node b lost")
    goodput = goodput_of(history.events, history.steps, now=None)
    facts = dict(replay_facts(goodput, num_added=5, num_removed=3))
    assert facts["trace"] == "5 nodes added, 3 removed"
    assert facts["run"].startswith("2 joined, 1 left; the others were lost before the run used them")
    assert facts["run"].endswith("; 1 preemption while it used them")
    assert "others" not in dict(replay_facts(goodput, num_added=2, num_removed=1))["run"]
    assert (goodput.num_nodes_joined, goodput.num_nodes_left) == (2, 1)


def test_summary_facts__resumed_run__one_clock_and_the_mean_speed(tmp_path: Path) -> None:
    history = History()
    for first in (1, 3):
        history.start()
        history.form(6.0)
        history.step(first, 1.0)
        history.step(first + 1, 3.0)
        history.steps[-1]["speed/tokens_per_s"] = 200.0
        history.stop()
        history.now += 30.0
    run = read_run(history.write(tmp_path, "resumed"))
    facts = dict(summary_facts(run, run.goodput()))
    assert facts["wall time"] == "20s in 2 sessions, without 30s between them"
    assert bucket_rows(run.goodput())[-1] == ["wall time", "20.0", "100.0%"]
    assert facts["speed"].startswith("400 tokens/s")
    assert facts["speed"].endswith("(mean of 4 steps)")


def test_change_rows__time_cause_and_duration() -> None:
    assert change_rows(eventful(), limit=10) == [["8s", "loss", "2 → 1", "3s", "node b lost"]]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"loss": 2.0, "metrics": {"perplexity": 7.389}}, "loss 2.0000, perplexity 7.39"),
        ({"loss": 0.5, "metrics": {"accuracy": 0.875, "f1": None}}, "loss 0.5000, accuracy 0.8750, f1 -"),
    ],
)
def test_evaluation_text__metrics_of_any_objective__shown_by_name(event: dict[str, Any], text: str) -> None:
    assert evaluation_text(event) == text


def test_plan_text__examples__says_that_only_tokens_with_loss_are_counted() -> None:
    examples = tiny_plan(replace(UNPREPARED, packing="examples"))
    assert "tokens with loss, " in headline(examples) and "with loss" not in headline(tiny_plan())
    assert "training tokens with loss (" in dict(plan_facts(examples))["corpus"]
    assert "training tokens (" in dict(plan_facts(tiny_plan()))["corpus"]


@pytest.mark.parametrize(
    ("value", "text"), [(6.49641, "6.4964"), (1e308, "1e+308"), (-2.5e7, "-2.5e+07"), (999_999.0, "999999.0000")]
)
def test_number__loss_of_any_size__is_short(value: float, text: str) -> None:
    assert number(value, ".4f") == text
