"""The progress of a run that a Python program waits for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest

import forge
from forge.events import SnapshotIntervalChanged
from forge.plan.plan import Plan
from forge.report.progress_lines import ProgressLines
from tests.support.jobs import tiny_plan
from tests.support.runs import History
from tests.support.tuning import BEGAN, ended, search_plan


def printed(records: Sequence[dict[str, Any]], *, plan: Plan) -> list[str]:
    out, now = io.StringIO(), [0.0]
    lines = ProgressLines(plan, out=out, clock=lambda: now[0])
    for record in records:
        now[0] = record["time"]
        lines(record)
    return out.getvalue().splitlines()


def test_progress_lines__run__first_last_and_every_five_seconds() -> None:
    history = History()
    history.start()
    history.form(1.0)
    for step in range(1, 7):
        history.step(step, 2.0, evaluation_s=0.5 if step == 2 else 0.0)
    lines = printed(sorted([*history.events, *history.steps], key=lambda record: record["time"]), plan=tiny_plan())
    assert [line.split("  loss")[0] for line in lines if "tokens/s" in line] == [
        "step      1/6",
        "step      4/6",
        "step      6/6",
    ]
    assert "step      2  held-out loss 1.0000, perplexity 2.70" in lines


def test_progress_lines__search__one_line_per_trial_event() -> None:
    from forge.events import event_to_record

    records = [{"time": BEGAN + at} | event_to_record(event) for at, event in enumerate(ended(1, value=2.5))]
    lines = printed(records, plan=search_plan())
    assert lines[0].startswith("trial 1 started in ")
    assert lines[-1].startswith("trial 1 finished at step ")


def test_progress_lines__control_characters__are_harmless() -> None:
    from forge.events import NodeLeft, event_to_record

    record = {"time": 1.0} | event_to_record(NodeLeft(node="a\x1b[2J", reason="b\nc"))
    (line,) = printed([record], plan=tiny_plan())
    assert "\x1b" not in line


def test_quiet__any_record__prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    forge.quiet({"time": 1.0, "event": SnapshotIntervalChanged.__name__})
    assert capsys.readouterr() == ("", "")


def test_progress_lines__long_evaluation__says_how_far_it_is_every_five_seconds() -> None:
    from forge.events import EvaluationProgress, event_to_record

    records = [
        {"time": 100.0 + seconds}
        | event_to_record(EvaluationProgress(step=7, weights="current", num_done=seconds, num_batches=1000))
        for seconds in range(2, 14, 2)
    ]
    assert printed(records, plan=tiny_plan()) == [
        "step      7  evaluating: 2 of 1,000 batches",
        "step      7  evaluating: 8 of 1,000 batches",
    ]
