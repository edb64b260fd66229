"""Reading spot traces: the CSV of Bamboo and the JSON lines of Parcae, which forge also writes.

Source: github.com/uclasystem/bamboo (`milliseconds,add|remove,node`) and github.com/JF-D/Parcae (a JSON
array per line). Files come from elsewhere, so sizes are limited and anything unexpected is rejected with its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from forge.chaos.trace import NodeChange, Trace, TraceBuilder
from forge.environment import looked_in
from forge.errors import ArgumentError, printable

_MAX_FILE_BYTES = 64 << 20
_MAX_LINE_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"
"""RFC 1952, section 2.3.1."""


def read_trace(path: Path) -> Trace:
    """Read a trace in the format of its first line; blank lines and `#` comments are skipped.

    Times count from the first line's.

    Raises: ArgumentError with `file:line` and what was expected there.
    """
    builder, formats = TraceBuilder(), _FORMATS
    for place, text in _lines(path):
        form = next((form for form, parse in formats.items() if parse(text) is not None), None)
        if form is None:
            raise ArgumentError(f"{place}: expected {_any_of(formats)}; got '{printable(text, limit=60)}'")
        formats = {form: formats[form]}
        parsed = formats[form](text)
        assert parsed is not None, "the format was chosen because it parses the line"
        change, lasts_s = parsed
        try:
            builder.add(at_s=change.at_s, added=change.added, removed=change.removed, lasts_s=lasts_s)
        except ArgumentError as error:
            raise ArgumentError(f"{place}: {error}") from None
    try:
        return builder.build()
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}; expected lines of {_any_of(formats)}") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are neither blank nor comments, each with `file:line`; read piece by piece."""
    number = num_bytes = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(_MAX_LINE_BYTES + 1):
                number, num_bytes = number + 1, num_bytes + len(raw)
                place = f"{path}:{number}"
                if number == 1 and raw.startswith(_GZIP):
                    raise ArgumentError(f"{path} is compressed; decompress it first: gzip -dc FILE > trace.csv")
                if len(raw) > _MAX_LINE_BYTES or num_bytes > _MAX_FILE_BYTES:
                    limits = f"{_MAX_LINE_BYTES >> 20} MiB in a line or {_MAX_FILE_BYTES >> 20} MiB in all"
                    raise ArgumentError(f"{place}: more than {limits}; expected a trace")
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text and not text.startswith("#"):
                    yield place, text
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}:{number}: expected text in UTF-8") from None
    except OSError as error:
        place = looked_in(path) if isinstance(error, FileNotFoundError) else ""
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}{place}") from error


def _parse_csv(text: str) -> tuple[NodeChange, float] | None:
    match [field.strip(' \t"') for field in text.split(",")]:
        case [at, "add" | "remove" as verb, node] if (at_ms := _number(at)) is not None:
            return _change(at_ms, verb, [node])
    return None


def _parse_json(text: str) -> tuple[NodeChange, float] | None:
    try:
        line = json.loads(text, parse_int=float)  # float: of any size, and never a bool
    except (ValueError, RecursionError):
        return None
    match line:
        case [float(at_ms), "add" | "remove" | "no-op" as verb, {"nodes": list(nodes), **others}]:
            return _change(at_ms, verb, nodes, lasts_ms=others.get("duration", 0.0))
    return None


def _change(
    at_ms: float, verb: str, nodes: list[str], *, lasts_ms: object = 0.0
) -> tuple[NodeChange, float] | None:
    """A change and how long it lasts at least, in seconds."""
    are_names = all(isinstance(node, str) and node and node.isprintable() for node in nodes)
    if not are_names or not isinstance(lasts_ms, float):
        return None
    added, removed = (tuple(nodes) if verb == each else () for each in ("add", "remove"))
    return NodeChange(at_s=at_ms / 1000, added=added, removed=removed), lasts_ms / 1000


def _number(text: str) -> float | None:
    """A number that is not negative; Python's own `float` accepts `nan`, `1_000` and `١` too."""
    return float(text) if re.fullmatch(r"[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,2})?", text) else None


def _any_of(formats: Mapping[str, object]) -> str:
    return " or ".join(f"`{form}`" for form in formats)


_FORMATS: Mapping[str, Callable[[str], tuple[NodeChange, float] | None]] = {
    "milliseconds,add|remove,node": _parse_csv,
    '[milliseconds, "add"|"remove"|"no-op", {"nodes": [...]}]': _parse_json,
}
"""What a line looks like → its parser, which returns None for other lines. No line matches both."""
