"""The task files under jobs/eval: valid, and their templates fit the records of the jobs that they are for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import jsonschema
import pytest

from forge.config.load import load_job, load_task
from forge.config.schema import task_schema
from forge.config.yaml_reader import compose
from forge.data.sources.base import Record
from forge.data.sources.build import build_source
from forge.evaluate.task import build_task
from tests.support.fixtures import require_fixture

JOBS = Path(__file__).parents[2] / "jobs"
TASKS = sorted((JOBS / "eval").glob("*.yaml"))
DATA = {
    "chat": ("chat", "chat"),
    "masked-lm": ("masked-lm", ""),
    "preferences": ("reward", "preferences"),
    "preferences-chat": ("dpo", "preferences"),
    "retrieval": ("embedding", "debian"),
    "sections": ("classification", "debian"),
    "sections-few-shot": ("classification", "debian"),
    "summaries": ("seq2seq", "debian"),
    "text": ("pretrain", ""),
    "translation": ("transformer-2017", "debian"),
}
"""The job whose records each task reads, and their fixture."""


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_task_file__every_one__is_valid_for_loader_and_schema(path: Path) -> None:
    build_task(load_task(path))
    body = compose(path.read_text(encoding="utf-8"), path=str(path), errors=[]).plain()
    assert list(jsonschema.Draft202012Validator(task_schema()).iter_errors(body)) == []


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_task_file__records_of_its_job__can_all_be_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, fixture = DATA[path.stem]
    if fixture:
        require_fixture(fixture)
    monkeypatch.chdir(JOBS.parent)
    task = build_task(load_task(path))
    examples = [task.example_of(record) for record in records_of(job, task_file=path.stem)]
    assert len(examples) > 5
    assert all(example.target and (example.prompt or example.choices) for example in examples)


def records_of(job: str, *, task_file: str) -> Iterator[Record]:
    records = islice(build_source(load_job(JOBS / f"{job}.yaml").data).records(), 300)
    if task_file != "sections-few-shot":
        return records
    return (record for record in records if record.fields["label"] in ("games", "doc", "science", "python", "perl"))
