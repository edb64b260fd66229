"""Read the end of one of a run's logs."""

from __future__ import annotations

import errno
from pathlib import Path

from forge.errors import ArgumentError
from forge.foreign import file_name, read_file_end

_MAX_BYTES = 2**24
"""Of a log's end; a rank that prints without end may have written any amount."""

_MAX_LISTED = 100


def last_lines(folder: Path, *, name: str, lines: int) -> str:
    """Return the last lines of `logs/<name>.log` of a run folder, never of a file elsewhere.

    Raises: ArgumentError listing the logs of the run.
    """
    logs = folder / "logs"
    path = logs / f"{name}.log"
    try:
        file_name(f"{name}.log")
        if logs.is_symlink():
            raise OSError(errno.ELOOP, "its folder is a link, which may lead outside the run folder")
        text = read_file_end(path, max_bytes=_MAX_BYTES).decode(errors="replace")
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = getattr(error, "strerror", None) or str(error)
        problem = "does not exist" if is_missing else f"cannot be read: {reason}"
        names = ", ".join(sorted(log.stem for log in logs.glob("*.log"))[:_MAX_LISTED]) or "none yet"
        raise ArgumentError(f"{path} {problem}; its logs are: {names}") from None
    return "".join(text.splitlines(keepends=True)[-lines:])
