"""The JSON schema says what the loader says, as far as a schema can."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from forge.config.fields import known_sections
from forge.config.job import JobSpec
from forge.config.schema import job_schema
from forge.config.yaml_reader import compose

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))


def as_written(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = compose(path.read_text(encoding="utf-8"), path=str(path), errors=[]).plain()
    return body


def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(job_schema())


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(job_schema())
    assert json.loads(json.dumps(job_schema())) == job_schema()


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_here_is_valid_as_written(path: Path) -> None:
    assert list(validator().iter_errors(as_written(path))) == []


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_an_editor_with_yaml_1_1_finds_every_job_here_valid_too(path: Path) -> None:
    assert list(validator().iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("section", [key for key, _ in known_sections(JobSpec) if key != "model"])
def test_an_unknown_key_is_refused_in_every_section_but_the_model(section: str) -> None:
    body = copy.deepcopy(as_written(JOBS[0]))
    inner = body
    for name in filter(None, section.split(".")):
        inner = inner.setdefault(name, {})
    inner["no_such_key"] = 1
    assert any("no_such_key" in error.message for error in errors_of(body))


def errors_of(body: dict[str, Any]) -> Iterator[jsonschema.ValidationError]:
    for error in validator().iter_errors(body):
        yield error
        yield from error.context or ()


def test_the_model_takes_its_configs_own_keys() -> None:
    assert job_schema()["$defs"]["ModelSpec"]["additionalProperties"] is True


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.seq_len", 1),
        ("training.optimizer.lr", 0),
        ("training.total_steps", 0),
        ("training.micro_batch_size", "atuo"),
        ("training.precision", "fp8"),
        ("training.zero.stage", 4),
        ("checkpoint.every", 50),
        ("resources.workers", 1.5),
        ("name", "My Job"),
    ],
)
def test_what_a_schema_can_see_is_wrong_it_refuses(key: str, value: object) -> None:
    body = copy.deepcopy(as_written(JOBS[0]))
    *sections, name = key.split(".")
    inner = body
    for section in sections:
        inner = inner[section]
    inner[name] = value
    assert list(validator().iter_errors(body))


def test_every_key_has_a_meaning_on_one_line() -> None:
    for key, section in known_sections(JobSpec):
        schema = job_schema()["$defs"][section.__name__] if key else job_schema()
        assert "\n" not in schema["description"]
        for name, field in section.model_fields.items():
            assert field.description, f"{key}.{name} has no docstring"
            assert "\n" not in schema["properties"][name].get("description", "")


def test_defaults_are_given_as_users_write_them() -> None:
    defs = job_schema()["$defs"]
    assert defs["CheckpointSpec"]["properties"]["every"]["default"] == "10m"
    assert defs["ResourcesSpec"]["properties"]["workers"]["default"] == "1"


def test_the_name_is_checked_alike_by_schema_and_types() -> None:
    pattern = job_schema()["properties"]["name"]["pattern"]
    for name in ("a", "a-b", "a1", "-a", "a-", "A", "a b", "", "ä"):
        try:
            JobSpec.model_validate({**as_written(JOBS[0]), "name": name})
            is_valid = True
        except ValueError:
            is_valid = False
        assert is_valid == (re.search(pattern, name) is not None)
