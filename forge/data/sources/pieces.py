"""Split long texts into pieces, so that memory use is independent of a document's length.

A piece has at most 2²⁰ characters and ends at the end of a line, across which no tokenizer merges tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PIECE_CHARS = 1 << 20
"""Longest piece; also the block size for reading files."""

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
    """Return the end of the next piece, at most PIECE_CHARS: before the last line break after a letter or digit.

    Otherwise before a line break after any visible character, otherwise before a space after one, otherwise
    anywhere.
    """
    for pattern in _CUTS:
        # Search the end first: the last 64 Ki characters nearly always contain a cut.
        for start in (PIECE_CHARS - (1 << 16), 0):
            ends = [found.end() for found in pattern.finditer(text, max(0, start), PIECE_CHARS + 1)]
            if ends:
                return ends[-1]
    return PIECE_CHARS
