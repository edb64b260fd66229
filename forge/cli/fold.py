"""Break text into lines for a terminal, between words only.

A path, a URL and a command are one word each, however long: the terminal shows the rest on its next line, and what
is copied has no newline in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len

_PROGRAMS = (
    r"forge (?:cluster|train|tune|runs|plan|data|generate|checkpoints|chaos|doctor|schema)\b",
    *(r"pip install \S+", r"apt-get install \S+", r"python[0-9.]* -m \S+", r"(?:kubectl|gcloud|az) [a-z]+", "sudo"),
    *("ray (?:status|stop|down|up|attach)", "ssh(?= -)", "export(?= [A-Z])", "ulimit", "make [a-z]+"),
)
_ACTIONS = (
    *("latest", "list", "show", "logs", "watch", "stop", "report", "tag", "note", "delete"),
    *("up", "status", "down", "drain", "verify", "export", "replay", "kill", "hang", "notice"),
)
_ARGUMENTS = (
    r"--?[\w-]+(?: (?!-)[^\s,;()]+)?",  # an option, with its value
    *(r"'[^']*'", r'"[^"]*"'),
    rf"(?:{'|'.join(_ACTIONS)})\b",
    r"[^\s,;()]*[A-Z0-9./_=~$-][^\s,;()]*",  # a name with a letter that no word has
)
_COMMAND = re.compile(rf"(?<![\w./'-])(?:{'|'.join(_PROGRAMS)})(?: (?:{'|'.join(_ARGUMENTS)}))*")
"""A command in a message: a program and what looks like its arguments."""


def fold(text: str, *, width: int) -> list[str]:
    """Break a text into lines of at most `width` characters, and longer ones if a word is longer.

    A line that was indented is continued with the same indentation.
    """
    return [folded for line in text.split("\n") for folded in _fold_line(line, width=width)]


def _fold_line(line: str, *, width: int) -> Iterator[str]:
    indent = line[: len(line) - len(line.lstrip())]
    current = indent
    for word in _words(line[len(indent) :]):
        used, length = cell_len(current), cell_len(word.rstrip())
        # A word that is longer than a line gains nothing from a line of its own.
        is_full = used > width or used + length > width >= len(indent) + length
        if is_full and current.strip():
            yield current.rstrip()
            current = indent
        current += word
    yield current.rstrip()


def _words(line: str) -> Iterator[str]:
    """Yield words with the blanks after them; a command is one word."""
    at = 0
    for command in _COMMAND.finditer(line):
        yield from re.findall(r"\S+\s*", line[at : command.start()])
        rest = re.match(r"\S*\s*", line[command.end() :])  # a comma or full stop, and blanks
        yield command[0] + (rest[0] if rest else "")
        at = command.end() + (rest.end() if rest else 0)
    yield from re.findall(r"\S+\s*", line[at:])
