from __future__ import annotations

import io

import pytest
from rich.console import Console

from forge.cli import display

ROWS = [
    ["tiny-0101-000000-abcd", "running", "3/6", "1.6667", "7.39", "3 minutes ago"],
    ["tiny-0102-000000-abcd", "finished", "6/6", "0.8333", "2.30", "2 hours ago"],
]
COLUMNS = ["run", "status", "#step", "#loss", "#held-out ppl", "#updated"]


def console(width: int) -> Console:
    return display.HarmlessConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def printed(terminal: Console) -> str:
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_table__narrow_terminal__breaks_no_word(width: int) -> None:
    terminal = console(width)
    display.table(COLUMNS, ROWS, console=terminal)
    expected = {word for row in ROWS for cell in row for word in cell.split()}
    assert expected <= set(printed(terminal).split())


def test_table__fits__has_one_line_a_row() -> None:
    terminal = console(80)
    display.table(COLUMNS, ROWS, console=terminal)
    assert len(printed(terminal).splitlines()) == 3


def test_message_and_next_command__narrow_terminal__keep_paths_and_commands_on_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal, path = console(60), f"/home/user/{'folder/' * 12}runs/tiny-0101-000000-abcd"
    monkeypatch.setattr(display, "ERR", terminal)
    display.message(f"run tiny in {path}")
    display.next_command(f"forge runs show {path} --runs elsewhere -o json", purpose="show it")
    assert printed(terminal).splitlines() == [
        f"run tiny in {path}",
        f"show it: forge runs show {path} --runs elsewhere -o json",
    ]
