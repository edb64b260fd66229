"""The screen of a run that goes on: a panel on a terminal, lines on a pipe."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from forge.cli import display
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


def shown(history: History, monkeypatch: pytest.MonkeyPatch, *, terminal_width: int | None) -> str:
    """What the screen has sent once all of it has happened."""
    sent = io.StringIO()
    console = Console(
        file=sent,
        force_terminal=terminal_width is not None,
        width=terminal_width,
        height=24,
        color_system=None,
        soft_wrap=terminal_width is None,
    )
    monkeypatch.setattr(display, "_err", console)
    monkeypatch.setattr(display.time, "time", lambda: history.now)
    with display.TrainScreen(tiny_plan()) as screen:
        for record in sorted([*history.events, *history.steps], key=moment):
            monkeypatch.setattr(screen, "_last_plain", -1e9)
            monkeypatch.setattr(screen, "_drawn_at", -1e9)  # as if each were a while after the one before
            screen.show(record)
    return sent.getvalue()


def panel(sent: str) -> list[str]:
    """The lines of the last panel under its first, as wide as they are drawn."""
    drawn = sent.rpartition("\nloss ")[2]
    return [re.sub(r"\x1b\[\??[0-9;]*[A-Za-z]", "", line) for line in drawn.splitlines()]


def test_on_a_terminal_a_line_says_where_the_time_went(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = shown(eventful(), monkeypatch, terminal_width=80)
    assert "goodput 27%  1 node  1 change  forming 47%  training 40%  repeated 13%" in panel(sent)
    assert "node b lost: connection closed; forming generation 2 of 1 worker from step 1 (memory)" in " ".join(
        line.strip() for line in sent.splitlines()
    )


@pytest.mark.parametrize(("width", "line"), [(40, "goodput 27%  1 node  1 change"), (20, "goodput 27%  1 node")])
def test_on_a_narrow_one_it_says_less(monkeypatch: pytest.MonkeyPatch, width: int, line: str) -> None:
    drawn = panel(shown(eventful(), monkeypatch, terminal_width=width))
    assert line in drawn
    assert max(map(len, drawn)) <= width


def test_a_run_without_changes_on_one_machine_has_no_such_line(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History()
    history.nodes = ("a",)
    history.start()
    history.form(1.0)
    history.step(1, 1.0)
    assert "goodput" not in shown(history, monkeypatch, terminal_width=80)


def test_the_panel_says_what_is_waited_for_until_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    history = eventful()
    history.change("loss", reason="node a lost")
    history.wait(5.0)
    waiting = "node a lost; waiting for machines: 1 of 2 workers"
    assert waiting in panel(shown(history, monkeypatch, terminal_width=80))
    history.form(1.0)
    history.step(3, 1.0)
    assert waiting not in panel(shown(history, monkeypatch, terminal_width=80))


def test_on_a_pipe_a_change_is_one_line_and_the_ledger_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(eventful(), monkeypatch, terminal_width=None).splitlines()
    assert lines.count("node b lost: connection closed; forming generation 2 of 1 worker from step 1 (memory)") == 1
    assert [line for line in lines if line.startswith("forming")] == [
        "forming the ranks",
        "forming generation 1 of 2 workers",
    ]
    assert "goodput" not in " ".join(lines)
