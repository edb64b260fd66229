"""The screen of a running run: a panel on a terminal, lines on a pipe."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from forge.cli.run_screen import TrainScreen
from forge.events import EvaluationProgress
from forge.runs.goodput import moment
from tests.support.jobs import tiny_plan
from tests.support.runs import History


def eventful() -> History:
    history = History()
    history.start()
    history.form(6.0)
    history.step(1, 2.0)
    history.nodes = ("a",)
    history.change("loss", reason="node b lost: connection closed")
    history.form(1.0)
    history.step(1, 2.0)
    history.step(2, 4.0)
    return history


def shown(history: History, *, terminal_width: int | None) -> str:
    """Everything the screen has sent once it has seen the whole history."""
    sent, now = io.StringIO(), [0.0]
    console = Console(
        file=sent,
        force_terminal=terminal_width is not None,
        width=terminal_width,
        height=24,
        color_system=None,
        soft_wrap=terminal_width is None,
    )
    with TrainScreen(tiny_plan(), console=console, clock=lambda: now[0]) as screen:
        for record in sorted([*history.events, *history.steps], key=moment):
            now[0] = record["time"]
            screen.show(record)
            screen.show(None)
    return sent.getvalue()


def panel(sent: str) -> list[str]:
    """The lines of the last panel under its first, as wide as they are drawn."""
    drawn = sent.rpartition("\nloss ")[2]
    return [re.sub(r"\x1b\[\??[0-9;]*[A-Za-z]", "", line) for line in drawn.splitlines()]


def test_train_screen__terminal__shows_goodput_and_changes() -> None:
    sent = shown(eventful(), terminal_width=80)
    assert "goodput 27%  1 node  1 change  starting 47%  training 40%  repeated 13%" in panel(sent)
    assert "node b lost: connection closed; starting generation 2 with 1 worker from step 1 (memory)" in " ".join(
        line.strip() for line in sent.splitlines()
    )


@pytest.mark.parametrize(("width", "line"), [(40, "goodput 27%  1 node  1 change"), (20, "goodput 27%  1 node")])
def test_train_screen__narrow_terminal__shortens_the_goodput_line(width: int, line: str) -> None:
    drawn = panel(shown(eventful(), terminal_width=width))
    assert line in drawn
    assert max(map(len, drawn)) <= width


def test_train_screen__one_node_without_changes__has_no_goodput_line() -> None:
    history = History()
    history.nodes = ("a",)
    history.start()
    history.form(1.0)
    history.step(1, 1.0)
    assert "goodput" not in shown(history, terminal_width=80)


def test_train_screen__too_few_machines__says_so_until_the_next_step() -> None:
    history = eventful()
    history.change("loss", reason="node a lost")
    history.wait(5.0)
    waiting = "node a lost; waiting for machines: 1 of 2 workers"
    assert waiting in panel(shown(history, terminal_width=80))
    history.form(1.0)
    history.step(3, 1.0)
    assert waiting not in panel(shown(history, terminal_width=80))


def test_train_screen__pipe__one_line_per_change_and_no_goodput() -> None:
    lines = shown(eventful(), terminal_width=None).splitlines()
    assert (
        lines.count("node b lost: connection closed; starting generation 2 with 1 worker from step 1 (memory)") == 1
    )
    assert [line for line in lines if line.startswith("starting")] == [
        "starting the workers",
        "starting generation 1 with 2 workers",
    ]
    assert "goodput" not in " ".join(lines)


@pytest.mark.parametrize("terminal_width", [80, None])
def test_train_screen__long_evaluation__says_how_far_it_is(terminal_width: int | None) -> None:
    history = eventful()
    history.now += 6
    history.record(EvaluationProgress(step=1, weights="current", num_done=12, num_batches=40))
    assert "evaluating: 12 of 40 batches" in shown(history, terminal_width=terminal_width)
