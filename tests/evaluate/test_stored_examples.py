"""Examples of a job's tasks: read once at the start of its run, kept in its folder, checked when they are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.config.evaluate import EvaluateSpec
from forge.errors import DataError
from forge.evaluate import stored_examples as stored_examples_module
from forge.evaluate.stored_examples import stored_examples, task_examples, with_task_examples
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.runs import create
from forge.runs.task_examples import TASK_EXAMPLES, cache_examples, has_examples
from tests.support.jobs import synthetic_corpus, tiny_plan

TASKS = {
    "write.yaml": "name: write\nkind: generate\nprompt: text\ntarget: text\nmetrics: {token_f1: {}}\n",
    "label.yaml": "name: a\nkind: classify\nprompt: text\ntarget: label\nlabel_kind: single\nmetrics: accuracy\n",
}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """With two tasks, one of whose 8 records cannot be used."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    records = [{"text": f"word {number}", "label": "ab"[number % 2]} for number in range(8)]
    del records[3]["label"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = f"data: {{files: {tmp_path / 'data.jsonl'}, on_bad_record: skip}}\n"
    tasks = {path: data + text for path, text in TASKS.items()}
    return with_tasks(tiny_plan(synthetic_corpus(tmp_path / "corpus")), tasks)


def with_tasks(plan: Plan, tasks: dict[str, str], **changes: Any) -> Plan:
    spec = EvaluateSpec.model_validate({"tasks": list(tasks), **changes})
    return replace(plan, job=plan.job.model_copy(update={"evaluate": spec}), tasks=tasks)


def test_with_task_examples__any_plan__keeps_what_the_tasks_read(plan: Plan, tmp_path: Path) -> None:
    found = with_task_examples(plan)
    assert found.task_examples is not None
    expected = {path: task_examples(plan, path=path, text=text) for path, text in plan.tasks.items()}
    assert stored_examples(found.task_examples) == expected
    assert {path: len(one.examples) for path, one in expected.items()} == {"write.yaml": 8, "label.yaml": 7}
    [warning] = found.warnings
    assert warning.startswith("label.yaml: 1 record left out of the task: ") and "data.jsonl:4" in warning
    assert plan_from_json(plan_to_json(found)).task_examples == found.task_examples
    limited = with_task_examples(with_tasks(plan, dict(plan.tasks), limit=2))
    assert limited.task_examples is not None
    assert [len(one.examples) for one in stored_examples(limited.task_examples).values()] == [2, 2]
    assert with_task_examples(replace(found, tasks={})).task_examples is None


def test_with_task_examples__resumed_run__keeps_its_examples_unless_the_tasks_changed(
    plan: Plan, tmp_path: Path
) -> None:
    before = with_task_examples(plan)
    create._keep_task_examples(tmp_path, before)
    (tmp_path / "data.jsonl").unlink()
    cache = tmp_path / "cache" / "tasks"
    for file in cache.iterdir():
        file.unlink()
    assert before.task_examples is not None and not has_examples(before.task_examples)
    again = with_task_examples(plan, before=before, run_folder=tmp_path)
    assert again.task_examples == before.task_examples and has_examples(again.task_examples)
    with pytest.raises(DataError, match=r"write\.yaml: .*matches no file"):
        with_task_examples(with_tasks(plan, dict(plan.tasks), limit=2), before=before, run_folder=tmp_path)


def test_stored_examples__changed_or_foreign_file__is_refused(plan: Plan, tmp_path: Path) -> None:
    digest = with_task_examples(plan).task_examples
    assert digest is not None
    [file] = (tmp_path / "cache" / "tasks").iterdir()
    file.write_bytes(file.read_bytes().replace(b"word", b"bird"))
    with pytest.raises(DataError, match="missing or were changed"):
        stored_examples(digest)
    (tmp_path / TASK_EXAMPLES).write_bytes(b"x")
    with pytest.raises(DataError, match="missing or were changed"):
        stored_examples(digest, run_folder=tmp_path)
    for content in (b"[1]\n", b'{"examples": 3}\n', b"\xff\n", b"[" * 10**5):
        with pytest.raises(DataError, match="are not forge's"):
            stored_examples(cache_examples(content))
    with pytest.raises(DataError, match="no digest"):
        stored_examples("../../etc/passwd")


def test_with_task_examples__too_many__says_which_task_and_what_to_set(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_examples_module, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"write\.yaml: .*more than 100 B.*set evaluate\.limit"):
        with_task_examples(plan)
