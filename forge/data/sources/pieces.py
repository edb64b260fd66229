"""Long texts in pieces, so that memory does not grow with a document.

A piece has at most 2²⁰ characters and is cut at the end of a line, where no tokenizer would join what is cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PIECE_CHARS = 1 << 20
"""Longest text handed on at once; also the block in which files are read."""

_CUTS = (re.compile(r"[^\W_](?=\n)"), re.compile(r"\S(?=\n)"), re.compile(r"\S(?= )"))
"""Every word pattern in use ends a word at the first (GPT-2's at all three), so cutting there changes no id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A text or a piece of a long one."""

    text: str
    starts: bool
    ends: bool


def blocks_of(text: str) -> Iterator[str]:
    """Cut a text into blocks of PIECE_CHARS characters, anywhere."""
    return (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))


def pieces_of(blocks: Iterable[str]) -> Iterator[Piece]:
    """Join blocks of text and cut them into pieces; an empty text has none."""
    rest = ""
    starts = True
    for block in blocks:
        rest += block
        while len(rest) > PIECE_CHARS:
            cut = _find_cut(rest)
            yield Piece(text=rest[:cut], starts=starts, ends=False)
            rest, starts = rest[cut:], False
    if rest:
        yield Piece(text=rest, starts=starts, ends=True)


def _find_cut(text: str) -> int:
    """Where to cut, at most PIECE_CHARS in: before the last line break after a letter or digit.

    Else before one after any visible character, else before a space after one, else anywhere.
    """
    for pattern in _CUTS:
        # Look at the end first: the last 64 Ki characters nearly always have such a place.
        for start in (PIECE_CHARS - (1 << 16), 0):
            ends = [found.end() for found in pattern.finditer(text, max(0, start), PIECE_CHARS + 1)]
            if ends:
                return ends[-1]
    return PIECE_CHARS
