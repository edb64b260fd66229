"""Parse and format sizes, durations, counts and ranges.

`parse_*` reads a string (or a plain number) and raises ValueError with a message that shows the correct form;
`format_*` returns a short string with about three significant digits. No other module parses units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction

_BYTES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\s*([0-9][0-9_]{,99}(?:\.[0-9]{1,99})?(?:[eE][+-]?[0-9]{1,3})?)\s*([A-Za-z]*)\s*")
_STEPS = re.compile(r"\s*([0-9][0-9_]{,17})\s*steps?\s*")
_RANGE = re.compile(r"\s*([0-9]{1,18})\s*(?:\.\.\s*([0-9]{1,18})\s*)?")
_FRACTION = re.compile(r"\s*([0-9]{0,99}\.?[0-9]{1,99}(?:[eE][+-]?[0-9]{1,3})?)\s*(%?)\s*")
_LENGTH = re.compile(r"\s*([0-9][0-9_.]{,99}\s?[A-Za-z]?)\s*?(?:\s(step|token)s?)?\s*")
_DATES = {"minutes": "%Y-%m-%d %H:%M", "seconds": "%Y-%m-%d %H:%M:%S"}
_LONGEST_S = 10 * 365 * 86400.0
_ISO_DATE = re.compile(r"\s*[0-9]{4}-")
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """An interval: a number of steps or a number of seconds, never both."""

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("an interval is a number of steps or a number of seconds")
        if self.steps is not None and self.steps < 1:
            raise ValueError("an interval must be at least 1 step")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError("an interval must be longer than zero seconds, and finite")

    def __str__(self) -> str:
        """Return the text that `parse_every` reads back exactly: `50 steps`, `1 step`, `10m`, `0.5s`."""
        if self.seconds is None:
            return f"{self.steps} step{'s' if self.steps != 1 else ''}"
        for unit, unit_s in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
            if self.seconds % unit_s == 0:
                return f"{int(self.seconds) // unit_s}{unit}"
        return f"{self.seconds!r}s"

    def is_due(self, *, step: int, seconds_since_last: float) -> bool:
        """Whether the interval ends after `step` (counted from 1)."""
        if self.seconds is not None:
            return seconds_since_last >= self.seconds
        return self.steps is not None and step % self.steps == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """A part of a training: a number of steps, of predicted tokens, or a share of it."""

    steps: int | None = None
    tokens: int | None = None
    percent: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.steps, self.tokens, self.percent) if value is not None]
        if len(given) != 1:
            raise ValueError("a length is a number of steps, a number of tokens or a share")
        if not 0 <= given[0] < math.inf:
            raise ValueError("a length must not be negative")
        if self.percent is not None and self.percent > 100:
            raise ValueError("must be at most 100%, the whole training")

    def __str__(self) -> str:
        """Return the text that `parse_length` reads back exactly: `20 steps`, `2000000 tokens`, `3%`."""
        if self.percent is not None:
            return f"{self.percent!r}%".replace(".0%", "%")
        return f"{self.steps} steps" if self.steps is not None else f"{self.tokens} tokens"

    def in_steps(self, *, total_steps: int, tokens_per_step: int) -> int:
        """Return the number of whole steps, rounded up."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        return math.ceil(total_steps * Fraction(repr(self.percent)) / 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """A point in time: seconds after the start of a run, or of the clock (since the epoch)."""

    seconds: float | None = None
    at: float | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.at is None):
            raise ValueError("a deadline is a duration or a date")
        if self.seconds is not None and self.seconds > _LONGEST_S:
            raise ValueError("must be at most ten years")

    def __str__(self) -> str:
        """Return the text that `parse_deadline` reads back exactly: `2d`, `2026-12-01T18:00:00+00:00`."""
        if self.at is not None:
            return datetime.fromtimestamp(self.at, UTC).isoformat()
        return str(Every(seconds=self.seconds))

    def at_s(self, *, start: float) -> float:
        """Seconds since the epoch, for a run that started at `start`."""
        return self.at if self.at is not None else start + (self.seconds or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A range of whole numbers from 0 on, both bounds included, written `2..16` or `4`."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError("a range must start at 0 or more, and its end must not be below its start")

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.low, self.high + 1))


def parse_bytes(text: str | int | float) -> int:
    """`80GB` → 80·10⁹, `4GiB` → 4·2³⁰; a plain number is in bytes."""
    return _whole(text, units=_BYTES, example="80GB or 512MiB")


def parse_count(text: str | int | float) -> int:
    """`20M` → 20,000,000; a plain number stays as it is."""
    return _whole(text, units=_COUNTS, example="20M or 1500")


def parse_duration_s(text: str | int | float) -> float:
    """`10m` → 600.0 seconds; a plain number is rejected, because its unit is unknown."""
    return _seconds(text, otherwise="is not a duration; write it with a unit, like 30s, 10m or 8h")


def parse_every(text: str) -> Every:
    """`50 steps` or `10m`."""
    if isinstance(text, str) and (match := _STEPS.fullmatch(text)):
        return Every(steps=int(match[1].replace("_", "")))
    return Every(seconds=_seconds(text, otherwise="is not an interval; write it like '50 steps' or '10m'"))


def parse_deadline(text: str) -> Deadline:
    """`48h`, or an ISO 8601 date with its time zone, such as `2026-12-01T18:00Z`."""
    otherwise = "is not a deadline; write it like 48h, 2d or 2026-12-01T18:00Z"
    if isinstance(text, str) and _ISO_DATE.match(text):
        try:
            at = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(otherwise) from None
        if not 2000 <= at.year < 9999:
            raise ValueError("must be a date after the year 2000")
        if at.tzinfo is None:
            raise ValueError("has no time zone; write it like 2026-12-01T18:00Z or 2026-12-01T18:00+01:00")
        return Deadline(at=at.timestamp())
    return Deadline(seconds=_seconds(text, otherwise=otherwise))


def parse_length(text: str | int) -> Length:
    """`20`, `20 steps`, `3%` or `2M tokens`."""
    if isinstance(text, int) and not isinstance(text, bool):
        return Length(steps=text)
    if isinstance(text, str) and text.rstrip().endswith("%"):
        return Length(percent=float(_percent(text)))
    match = _LENGTH.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ValueError("is not a length; write it like 20 steps, 3% or 2M tokens")
    count = parse_count(match[1])
    return Length(tokens=count) if match[2] == "token" else Length(steps=count)


def parse_range(text: str | int) -> Range:
    """`2..16` or `4`."""
    if isinstance(text, int) and not isinstance(text, bool):
        return Range(low=text, high=text)
    match = _RANGE.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ValueError("is not a range; write it like 4 or 2..16")
    return Range(low=int(match[1]), high=int(match[2] or match[1]))


def parse_fraction(text: str | int | float) -> float:
    """`1%` → 0.01; `0.01` → 0.01."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not abs(text) <= _LARGEST:
            raise ValueError("must be a finite number")
        return float(text)
    # Exact arithmetic, so that 0.7% is the float nearest to 0.007.
    return float(_percent(text) / 100)


def format_bytes(size_bytes: float) -> str:
    """Return a size with a binary unit and three significant digits: `1.35 GiB`."""
    return _scaled(size_bytes, base=1024, names=("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_count(count: float) -> str:
    """Return a count with a decimal suffix: `8.40M`, `1.60B`, `512`."""
    return _scaled(count, base=1000, names=("", "k", "M", "B", "T", "P", "E", "Z")).replace(" ", "")


def counted(count: int, noun: str) -> str:
    """Return a number of things: `1 shard`, `1,200 shards`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Return a duration as `850ms`, `42s`, `3m 05s`, `2h 05m` or `3d 04h`; `-` if it is not finite."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 0.9995:
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


def format_date(at: float | None, *, timespec: str = "minutes") -> str:
    """`2026-12-01 18:00 UTC` of seconds since the epoch; `-` if unknown or no date of this calendar."""
    try:
        return f"{datetime.fromtimestamp(math.nan if at is None else at, UTC):{_DATES[timespec]}} UTC"
    except (ValueError, OverflowError, OSError):
        return "-"


def _whole(text: str | int | float, *, units: dict[str, int], example: str) -> int:
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ValueError(f"is not a number; write it like {example}")
    if isinstance(text, str):
        match = _NUMBER.fullmatch(text)
        if not match or match[2].lower() not in units:
            raise ValueError(f"is not a number with a known unit; write it like {example}")
        value = Fraction(match[1].replace("_", "")) * units[match[2].lower()]
    elif not abs(text) <= _LARGEST:  # nan too
        raise ValueError(f"must not be larger than {_LARGEST}")
    else:
        value = Fraction(text)
    if value.denominator != 1:
        raise ValueError(f"is not a whole number; write it like {example}")
    if value > _LARGEST:
        raise ValueError(f"must not be larger than {_LARGEST}")
    return int(value)


def _percent(text: object) -> Fraction:
    """`1%` → 1, `0.01` → 1."""
    match = _FRACTION.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ValueError("is not a fraction; write it like 1% or 0.01")
    value = Fraction(match[1]) * (1 if match[2] else 100)
    if value > 100 * _LARGEST:
        raise ValueError("must be a finite number")
    return value


def _seconds(text: object, *, otherwise: str) -> float:
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if not match or match[2].lower() not in _SECONDS:
        raise ValueError(otherwise)
    seconds = float(match[1].replace("_", "")) * _SECONDS[match[2].lower()]
    if not 0 < seconds < math.inf:
        raise ValueError("must be greater than zero and finite")
    return seconds


def _scaled(value: float, *, base: int, names: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return "-"
    for name in names:
        if abs(value) < base * 0.9995 or name == names[-1]:
            break
        value /= base
    digits = 0 if name == names[0] or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {name}".rstrip()
