"""Printing for every command: messages, tables, facts and JSON.

Tables and summaries go to stdout, progress and messages to stderr. Colours and live displays are for terminals; on
a pipe the same information comes as plain lines. rich respects NO_COLOR.

Names and messages may come from run folders, clusters and models that others made. `harmless` removes what would
control the terminal, and both consoles apply it to everything they draw, so a screen cannot leave it out. Messages
also lose the values of this process's secrets.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from forge.cli.fold import fold
from forge.errors import harmless as harmless
from forge.redact import redacted


class HarmlessConsole(Console):
    """A console that makes all text harmless which it draws, also that of live screens; its own codes stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield segment._replace(text=harmless(segment.text))


OUT = HarmlessConsole(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
ERR = HarmlessConsole(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stderr.isatty())


_MIN_FACT_WIDTH = 24
"""With less room beside the names, the texts of facts are printed below them."""


def message(text: str, *, console: Console | None = None) -> None:
    """Print a message to stderr."""
    _print_folded(_shown(text), console=console or ERR)


def interrupted(text: str) -> None:
    """Print a message to stderr in place of the `^C` that a terminal shows, which would shift its first line."""
    if ERR.is_terminal:
        ERR.file.write("\r\033[K")
    message(text)


def warning(text: str, *, console: Console | None = None) -> None:
    """Print to stderr a problem that did not end the command."""
    _print_folded(f"! {_shown(text)}", console=console or ERR, style="yellow")


def error(text: str) -> None:
    """Print to stderr the error that ended the command."""
    _print_folded(f" {_shown(text)}", console=ERR, begin="error:", begin_style="bold red")


def next_command(command: str, *, purpose: str) -> None:
    """Print to stderr the next useful command, as a dim line."""
    ERR.print(Text(_line(f"{purpose}: {command}"), style="dim"), soft_wrap=True)  # one line, to be copied


def print_json(value: Any) -> None:
    """Print JSON to stdout; numbers that are not finite become null."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """Print text to stdout as it is, but without control characters: a pipe often leads to a terminal."""
    text = harmless(text)
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def heading(name: str, text: str) -> None:
    """Print an empty line, a bold name and a text to stdout."""
    OUT.print()
    headline(name, text, console=OUT)


def headline(name: str, text: str, *, console: Console) -> None:
    """Print a bold name and a text."""
    _print_folded(f"  {_line(text)}", console=console, begin=_line(name), begin_style="bold")


def terminal_width() -> int | None:
    """Return the width of stdout in characters; None if it is not a terminal."""
    return OUT.width if OUT.is_terminal else None


def facts(rows: Sequence[tuple[str, str]], *, console: Console | None = None) -> None:
    """Print names and texts in two columns."""
    console = console or OUT
    widest = max((cell_len(_line(name)) for name, _ in rows), default=0) + 2
    if not console.is_terminal:
        for name, text in rows:
            console.print(Text(f"{_line(name)}{' ' * (widest - cell_len(_line(name)))}{_shown(text)}"))
        return
    is_narrow = console.width - widest < _MIN_FACT_WIDTH
    indent = " " * (2 if is_narrow else widest)
    for name, text in rows:
        lines = fold(_shown(text), width=console.width - len(indent))
        label = _line(name)
        first = "" if is_narrow else " " * (widest - cell_len(label)) + lines.pop(0)
        rest = "".join(f"\n{indent}{line}" for line in lines)
        console.print(Text.assemble((label, "dim"), first, rest), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, console: Console | None = None) -> None:
    """Print a table; columns whose name starts with `#` are numbers and are right-aligned."""
    console = console or OUT
    columns, rows = [_line(name) for name in columns], [[_line(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        _print_plain_table(columns, rows, console=console)
        return
    widths = _column_widths([column.lstrip("#") for column in columns], rows, total=console.width)
    if widths is None:
        _print_vertical(columns, rows, console=console)
        return
    grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column, width in zip(columns, widths, strict=True):
        is_number = column.startswith("#")
        grid.add_column(column.lstrip("#"), justify="right" if is_number else "left", overflow="fold", width=width)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console.print(grid)


def _print_folded(text: str, *, console: Console, style: str = "", begin: str = "", begin_style: str = "") -> None:
    """Print a text whose words, paths and commands stay whole; on a pipe as it is.

    Args:
        begin: words before the text, with a style of their own.
    """
    whole = begin + text
    lines = [whole] if console.soft_wrap else fold(whole, width=console.width)
    at = min(len(begin), len(lines[0]))
    shown = Text.assemble((lines[0][:at], begin_style), ("\n".join([lines[0][at:], *lines[1:]]), style))
    console.print(shown, soft_wrap=True)  # as it is: a terminal shows the rest of a longer line on its next line


def _shown(text: str) -> str:
    """Text that may have several lines, harmless and without the values of secrets."""
    return harmless(redacted(text, os.environ))


def _line(text: str) -> str:
    """Text for one line, such as a cell of a table, in which a newline would look like another row."""
    return _shown(text).replace("\n", "\N{REPLACEMENT CHARACTER}").replace("\t", " ")


def _column_widths(names: Sequence[str], rows: Sequence[Sequence[str]], *, total: int) -> list[int] | None:
    """Return the widths of columns, two blanks apart, that break no word; None if these do not fit."""
    columns = [[name, *cells] for name, *cells in zip(names, *rows, strict=True)]
    widths = [max(cell_len(cell) for cell in column) for column in columns]
    least = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    room = total - 2 * (len(columns) - 1)
    while sum(widths) > room:
        reducible = [index for index in range(len(widths)) if widths[index] > least[index]]
        if not reducible:
            return None
        widths[max(reducible, key=widths.__getitem__)] -= 1
    return widths


def _print_vertical(columns: Sequence[str], rows: Sequence[Sequence[str]], *, console: Console) -> None:
    """Print a table that is wider than the terminal: the cells of a row as facts, an empty line between rows."""
    names = [column.lstrip("#") for column in columns]
    for number, row in enumerate(rows):
        if number:
            console.print()
        facts([(name, cell) for name, cell in zip(names, row, strict=True) if cell], console=console)


def _print_plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, console: Console) -> None:
    names = [column.lstrip("#") for column in columns]
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        cells = [
            cell.rjust(width) if column.startswith("#") else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        console.print(Text("  ".join(cells).rstrip()))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
