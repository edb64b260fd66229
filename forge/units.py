"""Sizes, durations, counts and ranges as people write them, both ways.

`parse_*` reads a string (or a plain number) and raises ValueError with a sentence a user can act on;
`format_*` writes the shortest string that still tells the truth. No other module parses units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BYTES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """An interval between two events: a number of steps or a number of seconds, never both."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:g}s"

    def is_due(self, *, step: int, seconds_since_last: float) -> bool:
        """Whether the event is due right after `step` (counted from 1)."""
        if self.steps is not None:
            return step % self.steps == 0
        return seconds_since_last >= (self.seconds or math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A closed range of whole numbers, written `2..16` or `4`."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.low, self.high + 1))


def parse_bytes(text: str | int) -> int:
    """`80GB` → 80·10⁹, `4GiB` → 4·2³⁰; a plain number is bytes."""
    return _whole(text, units=_BYTES, example="80GB or 512MiB")


def parse_count(text: str | int) -> int:
    """`20M` → 20,000,000; a plain number is itself."""
    return _whole(text, units=_COUNTS, example="20M or 1500")


def parse_duration_s(text: str | int | float) -> float:
    """`10m` → 600.0 seconds; a plain number is refused, because its unit would be a guess."""
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if not match or match[2].lower() not in _SECONDS:
        raise ValueError("not a duration; write it with a unit, like 30s, 10m or 8h")
    seconds = float(match[1].replace("_", "")) * _SECONDS[match[2].lower()]
    if not 0 < seconds < math.inf:
        raise ValueError("a duration must be greater than zero")
    return seconds


def parse_every(text: str) -> Every:
    """`50 steps` or `10m`."""
    if isinstance(text, str) and (match := re.fullmatch(r"\s*([0-9][0-9_]*)\s*steps?\s*", text)):
        steps = int(match[1].replace("_", ""))
        if steps < 1:
            raise ValueError("an interval must be at least 1 step")
        return Every(steps=steps)
    try:
        return Every(seconds=parse_duration_s(text))
    except ValueError:
        raise ValueError("not an interval; write it like '50 steps' or '10m'") from None


def parse_range(text: str | int) -> Range:
    """`2..16` or `4`."""
    match = re.fullmatch(r"\s*([0-9]+)\s*(?:\.\.\s*([0-9]+)\s*)?", text) if isinstance(text, str) else None
    if isinstance(text, int) and not isinstance(text, bool):
        low = high = text
    elif match:
        low, high = int(match[1]), int(match[2] or match[1])
    else:
        raise ValueError("not a range; write it like 4 or 2..16")
    if low < 1 or high < low:
        raise ValueError("a range must start at 1 or more and not run backwards")
    return Range(low=low, high=high)


def parse_fraction(text: str | int | float) -> float:
    """`1%` → 0.01; `0.01` → 0.01."""
    if isinstance(text, str) and (match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", text)):
        return float(match[1]) / 100
    try:
        if isinstance(text, bool):
            raise ValueError
        value = float(text)
    except ValueError:
        raise ValueError("not a fraction; write it like 1% or 0.01") from None
    if not math.isfinite(value):
        raise ValueError("a fraction must be a finite number")
    return value


def format_bytes(size_bytes: float) -> str:
    """Binary units, three significant digits: `1.35 GiB`."""
    return _scaled(size_bytes, base=1024, names=("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_count(count: float) -> str:
    """`8.4M`, `1.6B`, `512`."""
    return _scaled(count, base=1000, names=("", "k", "M", "B", "T", "P", "E", "Z")).replace(" ", "")


def format_duration(seconds: float) -> str:
    """`850ms`, `42s`, `3m 05s`, `2h 05m`, `3d 04h`; unknown (nan, inf) is `-`."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s".replace(".0s", "s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def _whole(text: str | int, *, units: dict[str, int], example: str) -> int:
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if not match or match[2].lower() not in units:
        raise ValueError(f"not a number with a known unit; write it like {example}")
    value = float(match[1].replace("_", "")) * units[match[2].lower()]
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"not a whole number; write it like {example}")
    return int(value)


def _scaled(value: float, *, base: int, names: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return "-"
    for name in names:
        if abs(value) < base * 0.9995 or name == names[-1]:
            break
        value /= base
    digits = 0 if name == names[0] or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {name}".rstrip()
