"""The JSON schema agrees with the loader, as far as a schema can."""

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
PRETRAIN = next(path for path in JOBS if path.name == "pretrain.yaml")


def as_written(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = compose(path.read_text(encoding="utf-8"), path=str(path), errors=[]).plain()
    return body


def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(job_schema())


def test_job_schema__itself__is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(job_schema())
    assert json.loads(json.dumps(job_schema())) == job_schema()


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_job_schema__jobs_of_the_repository__are_valid(path: Path) -> None:
    assert list(validator().iter_errors(as_written(path))) == []


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_job_schema__jobs_read_as_yaml_1_1__are_valid(path: Path) -> None:
    assert list(validator().iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("section", [key for key, _ in known_sections(JobSpec) if key != "model"])
def test_job_schema__unknown_key__is_rejected_except_in_model(section: str) -> None:
    body = copy.deepcopy(as_written(PRETRAIN))
    inner = body
    for name in filter(None, section.split(".")):
        inner = inner.setdefault(name, {})
    inner["no_such_key"] = 1
    assert any("no_such_key" in error.message for error in errors_of(body))


def errors_of(body: dict[str, Any]) -> Iterator[jsonschema.ValidationError]:
    for error in validator().iter_errors(body):
        yield error
        yield from error.context or ()


def test_job_schema__keys_of_the_model_config__are_accepted() -> None:
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
def test_job_schema__wrong_value__is_rejected(key: str, value: object) -> None:
    body = copy.deepcopy(as_written(PRETRAIN))
    *sections, name = key.split(".")
    inner = body
    for section in sections:
        inner = inner[section]
    inner[name] = value
    assert list(validator().iter_errors(body))


def test_job_schema__every_key__has_a_one_line_description() -> None:
    for key, section in known_sections(JobSpec):
        schema = job_schema()["$defs"][section.__name__] if key else job_schema()
        assert "\n" not in schema["description"]
        for name, field in section.model_fields.items():
            assert field.description, f"{key}.{name} has no docstring"
            assert "\n" not in schema["properties"][name].get("description", "")


def test_job_schema__defaults__are_in_user_form() -> None:
    defs = job_schema()["$defs"]
    assert defs["CheckpointSpec"]["properties"]["every"]["default"] == "10m"
    assert defs["ResourcesSpec"]["properties"]["workers"]["default"] == "1"


def test_job_schema__name__is_checked_as_by_load_job() -> None:
    pattern = job_schema()["properties"]["name"]["pattern"]
    for name in ("a", "a-b", "a1", "-a", "a-", "A", "a b", "", "ä"):
        try:
            JobSpec.model_validate({**as_written(PRETRAIN), "name": name})
            is_valid = True
        except ValueError:
            is_valid = False
        assert is_valid == (re.search(pattern, name) is not None)


def test_readme__named_jobs__exist() -> None:
    readme = (JOBS[0].parents[1] / "README.md").read_text()
    named = set(re.findall(r"\bjobs/([\w-]+\.yaml)", readme))
    assert named and named <= {path.name for path in JOBS}
