"""Printing for every command: messages, tables, facts and JSON.

Tables and summaries go to stdout, progress and messages to stderr. Colours and live displays are for terminals; on
a pipe the same information comes as plain lines. rich respects NO_COLOR.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

OUT = Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
ERR = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stderr.isatty())


def message(text: str, *, console: Console = ERR) -> None:
    """Print one line to stderr."""
    console.print(Text(text))


def warning(text: str, *, console: Console = ERR) -> None:
    """Print to stderr a problem that did not end the command."""
    console.print(Text(f"! {text}", style="yellow"))


def error(text: str) -> None:
    """Print to stderr the error that ended the command."""
    ERR.print(Text.assemble(("error:", "bold red"), " ", text))


def next_command(command: str, *, purpose: str) -> None:
    """Print to stderr the next useful command, as a dim line."""
    ERR.print(Text(f"{purpose}: {command}", style="dim"))


def print_json(value: Any) -> None:
    """Print JSON to stdout; numbers that are not finite become null."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """Print text unchanged to stdout; on a terminal without its control characters."""
    if sys.stdout.isatty():
        text = harmless(text)
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def heading(name: str, text: str) -> None:
    """Print an empty line, a bold name and a text to stdout."""
    OUT.print()
    OUT.print(Text.assemble((name, "bold"), f"  {text}"))


def terminal_width() -> int | None:
    """Return the width of stdout in characters; None if it is not a terminal."""
    return OUT.width if OUT.is_terminal else None


def facts(rows: Sequence[tuple[str, str]], *, console: Console = OUT) -> None:
    """Print names and texts in two columns."""
    if not console.is_terminal:
        for name, text in rows:
            console.print(Text(f"{name:<11} {text}"))
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(name, Text(text))
    console.print(grid)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, console: Console = OUT) -> None:
    """Print a table; columns whose name starts with `#` are numbers and are right-aligned."""
    if not console.is_terminal:
        _print_plain_table(columns, rows, console=console)
        return
    grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        is_number = column.startswith("#")
        grid.add_column(column.lstrip("#"), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console.print(grid)


def harmless(text: str) -> str:
    """Replace control characters, so that text from a run folder or a model cannot control the terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


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
