"""Lines for a host's shell that any login shell runs, and its output without that of the start-up files.

sshd passes a command to the user's login shell, which may be csh or fish, and reads its start-up files first, which
may print. So the line is given to `sh`, written in characters that these shells leave alone between single quotes,
and begins with printing a random marker: what comes before the marker is not the command's.
"""

from __future__ import annotations

import secrets
import string

_PLAIN = frozenset(string.printable) - frozenset("'\\!%" + string.whitespace) | {" "}
"""What sh, csh and fish take literally between single quotes, and printf prints as it is."""


def make_marker() -> str:
    """A line that no start-up file prints."""
    return f"forge-output-{secrets.token_hex(8)}"


def wrap_line(line: str, *, marker: str) -> str:
    """Return the command for a login shell that prints the marker to both outputs and runs a line of `sh`.

    Each other character than `_PLAIN` is written as printf's octal escapes of its bytes.
    """
    script = f"echo {marker}; echo {marker} >&2\n{line}"
    escaped = "".join(
        character if character in _PLAIN else "".join(f"\\{byte:03o}" for byte in character.encode())
        for character in script
    )
    return f"exec sh -c 'eval \"$(printf \"$0\")\"' '{escaped}'"


def after_marker(output: bytes, *, marker: str) -> bytes | None:
    """Return what follows the marker's line; None if the command did not begin."""
    _, found, rest = output.partition(f"{marker}\n".encode())
    return rest if found else None
