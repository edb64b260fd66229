"""Examples as the model sees them, drawn with the part that carries loss marked.

Every line that carries loss begins with the word `loss`, also without colours. Where loss begins and ends at every
few tokens, lines are not broken there, and what carries loss is in «». On a terminal it is green as well,
and special tokens are magenta, so that text which only spells their names looks different; elsewhere they are in
brackets.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from forge.cli import display
from forge.cli.fold import fold
from forge.plan.data_view import ShownExample
from forge.redact import redacted
from forge.report.data_view import ExampleLine, example_lines, example_title, visible

_LOSS_MARK = "loss │ "
_MASKED_MARK = "     │ "
_OPEN, _CLOSE = "⟦", "⟧"
"""Around special tokens where there are no colours."""
_MIN_TEXT_WIDTH = 8


def show_examples(examples: Sequence[ShownExample], *, console: Console, is_whole: bool = False) -> None:
    """Print examples one below the other.

    Args:
        is_whole: print every line of a long text.
    """
    if not examples:
        return
    console.print()
    is_plain = console.no_color or console.color_system is None
    legend = "what the model sees; it learns to predict the lines marked `loss`, of those with «» what is in them"
    legend += f"; special tokens are in {_OPEN}{_CLOSE}" if is_plain else ""
    for legend_line in [legend] if console.soft_wrap else fold(legend, width=console.width):
        console.print(Text(legend_line, style="dim"), soft_wrap=True)
    for example in examples:
        console.print()
        console.print(Text(example_title(example), style="bold"), soft_wrap=True)
        part: str | None = None
        for line in example_lines(example, is_whole=is_whole):
            if line.part is not None and line.part != part:
                part = line.part
                console.print(Text(f"{_MASKED_MARK}[{display.harmless(part)}]", style="dim"), soft_wrap=True)
            for text in _drawn(line, width=None if console.soft_wrap else console.width, is_plain=is_plain):
                console.print(text, soft_wrap=True)
        for name, values in example.arrays.items():
            console.print(Text(f"     {display.harmless(name)}: {values}", style="dim"), soft_wrap=True)


def _drawn(line: ExampleLine, *, width: int | None, is_plain: bool) -> Iterable[Text]:
    """A line with its mark; as many as needed where it is wider than the terminal."""
    room = None if width is None else max(_MIN_TEXT_WIDTH, width - len(_LOSS_MARK))
    mark, mark_style = (_LOSS_MARK, "green") if line.has_loss else (_MASKED_MARK, "dim")
    for pieces in _wrapped(line, room=room, is_plain=is_plain):
        yield Text.assemble((mark, mark_style), *pieces)


def _wrapped(line: ExampleLine, *, room: int | None, is_plain: bool) -> Iterable[list[tuple[str, str]]]:
    styled = [(character, style) for text, style in _styled(line, is_plain=is_plain) for character in text]
    whole = "".join(character for character, _ in styled)
    at = 0
    for part in chop_cells(whole, room) if room is not None else [whole]:
        group = styled[at : at + len(part)]
        at += len(part)
        yield [
            ("".join(character for character, _ in same), style)
            for style, same in groupby(group, key=lambda one: one[1])
        ]


def _styled(line: ExampleLine, *, is_plain: bool) -> Iterable[tuple[str, str]]:
    for piece in line.pieces:
        loss_style = "green" if piece.has_loss else ""
        is_marked = line.is_inline and piece.has_loss and piece.kind != "omitted"
        text = _shown(piece.text)
        if is_plain and piece.kind == "special" and text:
            text = f"{_OPEN}{text}{_CLOSE}"
        yield "«" * is_marked, loss_style
        yield text, {"omitted": "dim italic", "special": "magenta"}.get(piece.kind, loss_style)
        if piece.target:
            yield f" → {_shown(visible(piece.target))}", "bold green"
        yield "»" * is_marked, loss_style


def _shown(text: str) -> str:
    return display.harmless(redacted(text, os.environ)).replace("\n", "\N{REPLACEMENT CHARACTER}")
