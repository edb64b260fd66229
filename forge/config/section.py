"""Base class of the sections of job and cluster files, and the types of their values.

Sections are frozen and strict: an unknown key is an error, and a string is never silently read as a number. Values
with a unit are parsed once, here, by `forge.units`; later code sees plain numbers in base units. Each type has a
JSON schema, whose examples are strings that a user may write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema

from forge import units

MAX_WORKERS = 16_384
"""Source: benchmarks/RESULTS.md, "The supervisor at scale": simulated runs had up to 10,000 agents."""


class Section(BaseModel):
    """One section of a job file or cluster file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class FieldError(ValueError):
    """Raised by a section's validator to report a problem of one of its keys.

    Args:
        key: relative to the section, such as `schedule.warmup`; empty in the validator of one key's type.
        problem: one sentence, without the key.
        nearest: what to write instead, if that is clear.
        depends_on: other keys, relative to the section, whose values decide whether this is a problem.
    """

    def __init__(
        self, key: str, problem: str, *, nearest: str | None = None, depends_on: tuple[str, ...] = ()
    ) -> None:
        super().__init__(problem)
        self.key = key
        self.nearest = nearest
        self.depends_on = depends_on


class FieldErrors(ValueError):
    """Raised by a section's validator to report problems of several of its keys."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(f"{error.key}: {error}" for error in errors))
        self.errors = tuple(errors)


def raise_errors(errors: Sequence[FieldError]) -> None:
    """Raises: FieldErrors unless `errors` is empty."""
    if errors:
        raise FieldErrors(errors)


def unread_sections(
    section: Section, readers: Mapping[str, Sequence[str]], *, by: str, changed: bool = False
) -> Iterator[FieldError]:
    """Yield the problems of inner sections that are set, but not read with the value of a key.

    Args:
        readers: the values of the key with which each inner section is read.
        by: the key.
        changed: leave out inner sections with default values, which every section has that was read from a plan.
    """
    value = getattr(section, by)
    for key, values in readers.items():
        inner = getattr(section, key)
        is_given = key in section.model_fields_set and not (changed and inner == type(inner)())
        if is_given and value not in values:
            yield FieldError(key, f"is only for {by}: {' or '.join(values)}, not {value}", depends_on=(by,))


def _read_interval(value: Any) -> units.Every:
    return value if isinstance(value, units.Every) else units.parse_every(value)


def _read_interval_or_auto(value: Any) -> units.Every | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return _read_interval(value)
    except ValueError as error:
        raise ValueError(str(error).replace("'50 steps' or '10m'", "'50 steps', '10m' or auto")) from None


def _read_length(value: Any) -> units.Length:
    return value if isinstance(value, units.Length) else units.parse_length(value)


def _write_length(value: units.Length) -> int | str:
    return value.steps if value.steps is not None else str(value)


def _read_deadline(value: Any) -> units.Deadline:
    return value if isinstance(value, units.Deadline) else units.parse_deadline(value)


def _read_range(value: Any) -> units.Range:
    return value if isinstance(value, units.Range) else units.parse_range(value)


def _read_range_from_1(value: Any) -> units.Range:
    found = _read_range(value)
    if found.low < 1:
        raise ValueError("a range must start at 1 or more, and its end must not be below its start")
    if found.high > MAX_WORKERS:
        raise ValueError(f"a range must end at {MAX_WORKERS:,} or less, and this one ends at {found.high:,}")
    return found


def _read_duration(value: Any) -> float:
    # A plain number comes from `dump_job` or a plan, never from a user: YAML without a unit is rejected.
    return value if isinstance(value, float) else units.parse_duration_s(value)


def _read_whole_or_auto(value: Any) -> Any:
    # A union type would report one error per member.
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError("must be 'auto' or a whole number")
    return value


def _read_group_size(value: Any) -> Any:
    if value not in ("auto", "all") and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError("must be auto, all or a whole number")
    return value


def _read_flag_or_auto(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("must be auto, true or false")
    return value


def _read_checkpointing(value: Any) -> Any:
    if value != "selective" and not isinstance(value, bool):
        raise ValueError("must be true, false or selective")
    return value


def _read_strings(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Number = float
"""In strict mode: an int or a float, but no string and no bool."""

Count = Annotated[
    int,
    BeforeValidator(units.parse_count),
    WithJsonSchema({"type": ["integer", "string"], "examples": ["20M"]}),
]

FlagOrAuto = Annotated[
    Literal["auto"] | bool,
    BeforeValidator(_read_flag_or_auto),
    WithJsonSchema({"enum": ["auto", True, False]}),
]

Checkpointing = Annotated[
    Literal["selective"] | bool,
    BeforeValidator(_read_checkpointing),
    WithJsonSchema({"enum": [True, False, "selective"]}),
]

WholeOrAuto = Annotated[
    Literal["auto"] | int,
    BeforeValidator(_read_whole_or_auto),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
]

GroupSize = Annotated[
    Literal["auto", "all"] | int,
    BeforeValidator(_read_group_size),
    WithJsonSchema({"anyOf": [{"enum": ["auto", "all"]}, {"type": "integer", "minimum": 2}]}),
]

Fraction = Annotated[
    float,
    BeforeValidator(units.parse_fraction),
    WithJsonSchema({"type": ["number", "string"], "examples": ["1%"]}),
]

Interval = Annotated[
    units.Every,
    BeforeValidator(_read_interval),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["50 steps", "10m"]}),
]

IntervalOrAuto = Annotated[
    Literal["auto"] | units.Every,
    BeforeValidator(_read_interval_or_auto),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["auto", "50 steps", "10m"]}),
]

TrainLength = Annotated[
    units.Length,
    BeforeValidator(_read_length),
    PlainSerializer(_write_length),
    WithJsonSchema({"type": ["integer", "string"], "examples": ["3%", "2M tokens"]}),
]
"""A part of a training."""

DeadlineTime = Annotated[
    units.Deadline,
    BeforeValidator(_read_deadline),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["48h", "2026-12-01T18:00Z"]}),
]

WholeRange = Annotated[
    units.Range,
    BeforeValidator(_read_range_from_1),
    PlainSerializer(str),
    WithJsonSchema({"type": ["integer", "string"], "examples": ["1..2"]}),
]

RangeFromZero = Annotated[
    units.Range,
    BeforeValidator(_read_range),
    PlainSerializer(str),
    WithJsonSchema({"type": ["integer", "string"], "examples": ["0..8"]}),
]

Bytes = Annotated[
    int,
    BeforeValidator(units.parse_bytes),
    WithJsonSchema({"type": ["integer", "string"], "examples": ["200GB"]}),
]

Duration = Annotated[
    float,
    BeforeValidator(_read_duration),
    WithJsonSchema({"type": "string", "examples": ["10m"]}),
]
"""Seconds."""

Strings = Annotated[
    tuple[str, ...],
    BeforeValidator(_read_strings),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
"""One string, or a list of strings."""
