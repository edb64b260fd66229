"""JSON schema of the job file, with which editors complete keys, show their meaning and mark errors.

It is less strict than `load_job`, which also checks units and constraints between keys. It rejects `${env:NAME}` in
place of a number, which `load_job` accepts.
"""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from forge.config.fields import known_sections
from forge.config.job import JobSpec
from forge.units import Every, Range

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def job_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a job file."""
    schema: dict[str, Any] = _tidied(JobSpec.model_json_schema(schema_generator=_Generator))
    for key, section in known_sections(JobSpec):
        properties = schema["$defs"][section.__name__]["properties"] if key else schema["properties"]
        for name, field in section.model_fields.items():
            properties[name] |= _bounds(field)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A forge job", **schema}


class _Generator(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, (Every, Range)) else super().encode_default(dft)


def _tidied(value: Any) -> Any:
    """Join descriptions to one line; drop the titles and bounds that pydantic derives from the Python types."""
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    if not isinstance(value, dict):
        return value
    tidy = {key: _tidied(item) for key, item in value.items() if isinstance(item, dict) or key not in _UNTIDY}
    if isinstance(tidy.get("description"), str):
        tidy["description"] = " ".join(tidy["description"].split())
    return tidy


_UNTIDY = {"title", *_BOUNDS}


def _bounds(field: FieldInfo) -> dict[str, float]:
    """Return the bounds of a field, which pydantic omits for types with a custom schema."""
    return {
        keyword: getattr(bound, name)
        for bound in field.metadata
        for name, keyword in _BOUNDS.items()
        if getattr(bound, name, None) is not None
    }
