"""The screen of a running search: a table on a terminal, lines on a pipe."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from forge.cli.trials_screen import TuneScreen
from forge.events import CostUpdated, Event, NodeLeft, RunStarted, event_to_record
from tests.support.tuning import BEGAN, begun, ended, search_plan

START = RunStarted(run_id="s", total_steps=6, resumed_from_step=0)
MANY = [event for trial in range(1, 9) for event in ended(trial, value=10.0 - trial)]


def shown(
    events: Sequence[Event],
    *,
    size: tuple[int, int] | None,
    num_past: int = 0,
) -> str:
    """What the screen has sent once all of it has happened, a second apart."""
    sent = io.StringIO()
    width, height = size or (None, None)
    console = Console(
        file=sent,
        force_terminal=size is not None,
        width=width,
        height=height,
        color_system=None,
        soft_wrap=not size,
    )
    records = [{"time": BEGAN + at} | event_to_record(event) for at, event in enumerate(events)]
    plan, past, now = search_plan(max_trials=12), records[:num_past], BEGAN + len(records)
    with TuneScreen(plan, past=past, console=console, clock=lambda: now) as screen:
        for record in [*records[num_past:], None]:
            screen.show(record)
    return sent.getvalue()


def panel(sent: str) -> list[str]:
    """The lines of the last panel."""
    drawn = re.sub(r"\x1b\[\??[0-9;]*[A-Za-z]", "", sent[sent.rindex("/12 trials") - 1 :])
    return [line.strip("\r") for line in drawn.splitlines() if line.strip()]


def test_tune_screen__terminal__shows_best_and_newest_that_fit() -> None:
    events = [START, *MANY, CostUpdated(usd=1.25, usd_per_hour=3600.0), *begun(9, values={2: 9.5})]
    lines = panel(shown(events, size=(90, 10)))
    assert lines == [
        "8/12 trials  37s, about 3s left",
        "best: trial 8, eval/loss 2.0000  lr=0.008 warmup=8",
        "1.25 USD, about 3.00 more",
        "trial  status    step  eval/loss  values             time",
        "    9  running    2/6     9.5000  lr=0.009 warmup=9    3s",
        "   *8  finished   6/6     2.0000  lr=0.008 warmup=8    3s",
        "    7  finished   6/6     3.0000  lr=0.007 warmup=7    3s",
        "    6  finished   6/6     4.0000  lr=0.006 warmup=6    3s",
        "… and 5 more",
    ]


@pytest.mark.parametrize("size", [(40, 10), (20, 5), (3, 3), (1, 1)])
def test_tune_screen__small_terminal__fits(size: tuple[int, int]) -> None:
    events = [START, *MANY, CostUpdated(usd=1.25, usd_per_hour=3600.0), *begun(9, values={2: 9.5})]
    sent = shown(events, size=size)
    lines = [re.sub(r"\x1b\[\??[0-9;]*[A-Za-z]", "", line).strip("\r") for line in sent.splitlines()]
    assert max(map(len, lines)) <= size[0]


def test_tune_screen__failed_trial__leaves_a_warning() -> None:
    events = [START, *ended(1, value=1.0), *ended(2, step=3, status="diverged", reason="the loss is no number")]
    sent = shown(events, size=(90, 10))
    assert "! trial 2 diverged at step 3: the loss is no number" in sent
    assert "trial 1 finished" not in sent


def test_tune_screen__before_the_first_trial__says_that_it_starts() -> None:
    assert "starting the first trials … 1s" in shown([START], size=(90, 10))


def test_tune_screen__pipe__one_line_per_event() -> None:
    lost = NodeLeft(node="b", reason="connection closed")
    lines = shown([START, *ended(1, value=1.0), lost], size=None).splitlines()
    assert lines == [
        "starting the first trials",
        "trial 1 started in 1.2s: lr=0.001 warmup=1",
        "trial 1 step 6 eval/loss 1.0000",
        "trial 1 finished at step 6, eval/loss 1.0000",
        "node b left: connection closed",
    ]


def test_tune_screen__past_events__are_not_printed() -> None:
    events = [START, *ended(1, value=1.0), START, *ended(2, value=2.0)]
    assert "trial 1" not in shown(events, size=None, num_past=5)
    assert "best: trial 1, eval/loss 1.0000" in shown(events, size=(90, 10), num_past=5)
