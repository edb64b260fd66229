"""The last line of a log, for a message about a process that ended without saying why."""

from __future__ import annotations

from pathlib import Path

from forge.errors import printable
from forge.foreign import read_file_end

_END_BYTES = 4096
_MAX_CHARS = 300


def last_line(log: Path) -> str:
    """The last line that is not empty, shortened and escaped; empty if there is none or it cannot be read."""
    try:
        text = read_file_end(log, max_bytes=_END_BYTES).decode(errors="replace")
    except OSError:
        return ""
    lines = [line for line in text.splitlines() if line.strip()]
    return printable(lines[-1].strip(), limit=_MAX_CHARS) if lines else ""
