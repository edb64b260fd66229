"""The base of every section of a job file, and the types its values are written in.

Sections are frozen and strict: an unknown key is an error, a string is never silently taken for a
number. Values with a unit are parsed here, once, by `forge.units`; from here on they are plain
numbers whose unit ends the name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema

from forge import units


class Section(BaseModel):
    """One section of the job file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Number = Annotated[float, BeforeValidator(_as_float)]
"""A float that may be written as a whole number."""

Count = Annotated[
    int,
    BeforeValidator(units.parse_count),
    WithJsonSchema({"type": ["integer", "string"], "examples": ["20M", 1500]}),
]

Fraction = Annotated[
    float,
    BeforeValidator(units.parse_fraction),
    WithJsonSchema({"type": ["number", "string"], "examples": ["1%", 0.01]}),
]

Interval = Annotated[
    units.Every,
    BeforeValidator(lambda value: value if isinstance(value, units.Every) else units.parse_every(value)),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["50 steps", "10m"]}),
]

WholeRange = Annotated[
    units.Range,
    BeforeValidator(lambda value: value if isinstance(value, units.Range) else units.parse_range(value)),
    PlainSerializer(str),
    WithJsonSchema({"type": ["integer", "string"], "examples": ["1..2", 4]}),
]

def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Strings = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
"""One string, or a list of them."""
