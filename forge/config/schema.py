"""JSON schemas of job files and task files, with which editors complete keys, show their meaning and mark errors.

They are less strict than `load_job` and `load_task`, which also check units and constraints between keys. They
reject `${env:NAME}` in place of a number, which those accept.
"""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from forge.config.fields import known_sections
from forge.config.job import JobSpec
from forge.config.section import Section
from forge.config.task import TaskSpec
from forge.config.task_metrics import MetricsSpec
from forge.units import Every, Range

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def job_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a job file."""
    return _schema_of(JobSpec, title="A forge job")


def task_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a task file of `forge eval`."""
    schema = _schema_of(TaskSpec, title="A task of forge eval")
    properties, names = schema["properties"], list(MetricsSpec.model_fields)
    name, description = {"enum": names}, properties["metrics"].pop("description")
    forms = [properties["metrics"], name, {"type": "array", "items": name, "minItems": 1}]
    properties["metrics"] = {"description": description, "anyOf": forms}
    answer = properties["answer"]
    readings = schema["$defs"]["AnswerSpec"]["properties"]["read"]["enum"]
    answer["anyOf"] = [{"$ref": answer.pop("$ref")}, {"enum": readings}]
    return schema


def _schema_of(root: type[Section], *, title: str) -> dict[str, Any]:
    schema: dict[str, Any] = _tidied(root.model_json_schema(schema_generator=_Generator))
    for key, section in known_sections(root):
        properties = schema["$defs"][section.__name__]["properties"] if key else schema["properties"]
        for name, field in section.model_fields.items():
            properties[name] |= _bounds(field)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


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
