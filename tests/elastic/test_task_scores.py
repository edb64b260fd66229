"""Tasks scored during training on real Ray, while ranks are killed in the middle of scoring."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from forge.plan.plan import plan_from_json
from forge.runs.reader import read_metrics
from tests.support.command import wait_for
from tests.support.elastic import Run, leftovers, machines, start_run, write_job
from tests.support.ranks import run_ranks

TASK = """\
name: write
data: {files: data.jsonl}
kind: generate
prompt: text
target: text
sampling: {max_tokens: 24}
metrics: {token_f1: {}, chrf: {}}
"""
LAST, EVERY = 14, 6


def write_scored_job(folder: Path) -> None:
    """The job of elastic tests with a task whose scoring takes seconds."""
    write_job(folder, steps=LAST, lr=1e-3, workers="2")
    text = (folder / "job.yaml").read_text()
    text = text.replace("held_out: 0}", "held_out: 0.05}")
    text = text.replace("training:\n", f"training:\n  evaluate_every: {EVERY} steps\n")
    (folder / "job.yaml").write_text(text + "evaluate: {tasks: [task.yaml], every: evaluation}\n")
    (folder / "task.yaml").write_text(TASK)
    lines = [json.dumps({"text": f"the cat {number} sat"}) for number in range(1500)]
    (folder / "data.jsonl").write_text("\n".join(lines))


def at(run: Run, kind: str, step: int) -> int:
    return sum(event["step"] == step for event in run.of(kind))


def kill_while_scoring(run: Run, step: int, *, rank: int) -> None:
    """Kill a rank once the held-out loss of a step is known and its tasks are being scored."""
    wait_for(lambda: at(run, "Evaluated", step), timeout_s=120, about=run.newest_events)
    before = run.formed["generation"]
    os.kill(run.formed["ranks"][rank]["pid"], signal.SIGKILL)
    wait_for(lambda: run.formed["generation"] > before, timeout_s=120, about=run.newest_events)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_ranks__while_tasks_are_scored__each_evaluation_is_scored_once(tmp_path: Path) -> None:
    write_scored_job(tmp_path)
    with machines(tmp_path, count=2) as cluster:
        run = start_run(cluster)
        wait_for(lambda: run.formed["world_size"] == 2, timeout_s=120, about=run.newest_events)
        kill_while_scoring(run, EVERY, rank=1)
        kill_while_scoring(run, 2 * EVERY, rank=0)
        wait_for(lambda: run.of("RunFinished"), timeout_s=240, about=run.newest_events)
        assert leftovers(run) == []
    counts = {step: (at(run, "Evaluated", step), at(run, "TasksScored", step)) for step in (EVERY, 2 * EVERY, LAST)}
    assert counts == {EVERY: (2, 1), 2 * EVERY: (2, 1), LAST: (1, 2)}, "the second of the last step: its checkpoint"
    records = read_metrics(run.folder)
    assert [record["step"] for record in records] == list(range(1, LAST + 1))
    plan = plan_from_json((run.folder / "plan.json").read_text())
    expected = run_ranks(plan, tmp_path / "undisturbed", world_size=2).steps
    for record, step in zip(records, expected, strict=True):
        scores = {key: value for key, value in step.extra.items() if key.startswith("evaluate/")}
        assert bool(scores) is (step.step in (EVERY, 2 * EVERY, LAST))
        found = {key: value for key, value in record.items() if key.startswith("evaluate/")}
        assert found == pytest.approx(scores, rel=1e-3)
        assert record["train/loss"] == pytest.approx(step.loss, abs=1e-4)
