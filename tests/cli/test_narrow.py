from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.cells import cell_len
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


def test_table__long_names_on_a_narrow_terminal__have_their_cells_below_them() -> None:
    terminal = console(50)
    columns = ["model", *(f"debian-sections-few-shot {metric}_accuracy ↑" for metric in ("plain", "normalized"))]
    cells = ["smollm2", "0.500 [0.000, 1.000]", "0.250 [0.000, 0.500]"]
    display.table(columns, [cells], console=terminal)
    expected = [line for name, cell in zip(columns, cells, strict=True) for line in (name, f"  {cell}")]
    assert printed(terminal).splitlines() == expected


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


def test_interrupted__terminal_shows_the_key__is_printed_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = console(40)
    monkeypatch.setattr(display, "ERR", terminal)
    display.interrupted("stopping: running requests are finished first")
    assert printed(terminal) == "\r\033[Kstopping: running requests are finished\nfirst\n"


LONG_PATH = f"/home/user/{'folder/' * 12}runs/tiny-0101-000000-abcd"
COMMAND = "forge train jobs/pretrain.yaml --set training.total_steps=50 --cluster lab"
TEXTS = [
    f"the checkpoint in {LONG_PATH} does not verify: 3 of 12 files have another size than the manifest says",
    f"{LONG_PATH} is not a run; start it again with the values of before: {COMMAND}, then watch it",
    "no cluster is up; forge train starts one and stops it at the end of the run, forge cluster up one that stays",
    "rsync is missing, which copies forge to the head; install it: apt-get install rsync\n  then: forge cluster up",
    "wörter in ünïcode 数据 and an emoji 🎉 between ordinary words that are long enough for several lines",
]


def printers() -> dict[str, Callable[[str, Console], None]]:
    def facts(text: str, terminal: Console) -> None:
        display.facts([("checkpoint", text), ("files", text)], console=terminal)

    return {
        "message": lambda text, terminal: display.message(text, console=terminal),
        "warning": lambda text, terminal: display.warning(text, console=terminal),
        "error": lambda text, terminal: display.error(text),
        "headline": lambda text, terminal: display.headline("name", text.replace("\n", " "), console=terminal),
        "facts": facts,
    }


@pytest.mark.parametrize("width", [20, 40, 60, 100])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("printer", list(printers()))
def test_text__narrow_terminal__breaks_between_words_and_never_in_a_path_or_command(
    monkeypatch: pytest.MonkeyPatch, printer: str, text: str, width: int
) -> None:
    terminal = console(width)
    monkeypatch.setattr(display, "ERR", terminal)
    printers()[printer](text, terminal)
    lines = printed(terminal).splitlines()
    words = " ".join(lines).split()
    assert [word for word in text.split() if word not in words] == []
    for whole in (LONG_PATH, COMMAND, "apt-get install rsync"):
        assert (whole in text) == any(whole in line for line in lines)
    too_long = [line for line in lines if cell_len(line) > width]
    assert [line for line in too_long if "/" not in line and "forge" not in line and "apt-get" not in line] == []


def test_text__wide_terminal__one_line() -> None:
    terminal = console(200)
    display.message(TEXTS[2], console=terminal)
    assert printed(terminal) == TEXTS[2] + "\n"


def test_facts__folded_text__continues_below_its_beginning() -> None:
    terminal = console(40)
    display.facts([("model", "one two three four five six seven eight"), ("x", "nine")], console=terminal)
    assert printed(terminal).splitlines() == [
        "model  one two three four five six seven",
        "       eight",
        "x      nine",
    ]


def test_error__pipe__one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = display.HarmlessConsole(file=io.StringIO(), soft_wrap=True, color_system=None)
    monkeypatch.setattr(display, "ERR", pipe)
    display.error(TEXTS[0])
    assert printed(pipe) == f"error: {TEXTS[0]}\n"


def test_facts__pipe__texts_begin_in_one_column() -> None:
    pipe = display.HarmlessConsole(file=io.StringIO(), soft_wrap=True, color_system=None)
    display.facts([("held out, ema", "loss 1.0"), ("speed", "2 tokens/s")], console=pipe)
    assert printed(pipe).splitlines() == ["held out, ema  loss 1.0", "speed          2 tokens/s"]
