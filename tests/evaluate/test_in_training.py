"""Tasks scored between steps: the same scores at any number of ranks, and training does not notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.config.evaluate import EvaluateSpec
from forge.config.load import load_task_text
from forge.errors import ForgeError
from forge.evaluate.results import score_task
from forge.evaluate.shards import TaskShards
from forge.evaluate.stored_examples import with_task_examples
from forge.evaluate.task import build_task
from forge.evaluate.worker import ShardAnswerer
from forge.inference.loaded import load
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan, plan_to_json
from tests.support.jobs import synthetic_corpus, tiny_plan
from tests.support.objectives import write_tokenizer
from tests.support.ranks import Recording, run_ranks

pytestmark = pytest.mark.slow

TASKS = {
    "write": "kind: generate\nprompt: text\ntarget: text\nsampling: {max_tokens: 4}\nmetrics: {token_f1: {}}\n",
    "text": "kind: log-likelihood\nprompt: text\ntarget: text\nmetrics: {bits_per_byte: {}}\n",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = synthetic_corpus(folder)
    write_tokenizer(folder / "tokenizer")
    return corpus


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"text": f"word {number} ab"}) for number in range(70)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    data = f"data: {{files: {folder / 'data.jsonl'}}}\n"
    return {f"{name}.yaml": f"name: {name}\n{data}{text}" for name, text in TASKS.items()}


def plan_of(corpus: CorpusInfo, tasks: dict[str, str], *, stage: int = 1, **changes: Any) -> Plan:
    plan = tiny_plan(
        corpus, model__vocab_size=300, training__precision="fp32", training__zero={"stage": stage},
        training__evaluate_every="2 steps", **changes,
    )  # fmt: skip
    spec = EvaluateSpec.model_validate({"tasks": list(tasks), "every": "evaluation"})
    model = replace(plan.model, vocab_size=300, max_seq_len=64)
    job = plan.job.model_copy(update={"evaluate": spec})
    return with_task_examples(replace(plan, model=model, job=job, tasks=tasks))


def scores_of(recording: Recording) -> list[dict[str, float]]:
    scores = [
        {key: value for key, value in step.extra.items() if key.startswith("evaluate/")} for step in recording.steps
    ]
    assert [step.step for step, found in zip(recording.steps, scores, strict=True) if found] == [2, 4, 6]
    return [found for found in scores if found]


def test_score__any_world_size_and_stage__same_scores_and_same_training(
    corpus: CorpusInfo, tasks: dict[str, str], tmp_path: Path
) -> None:
    alone = run_ranks(plan_of(corpus, tasks), tmp_path / "alone", world_size=1)
    scores = scores_of(alone)
    assert set(scores[0]) == {"evaluate/write/token_f1", "evaluate/text/bits_per_byte"}
    assert scores[-1]["evaluate/text/bits_per_byte"] != scores[0]["evaluate/text/bits_per_byte"]
    without = replace(plan_of(corpus, tasks), tasks={})
    assert run_ranks(without, tmp_path / "without", world_size=1).losses == alone.losses, "training sees nothing"
    for stage, world_size in ((0, 2), (3, 3)):
        found = run_ranks(plan_of(corpus, tasks, stage=stage), tmp_path / f"{stage}", world_size=world_size)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)
        for one, other in zip(scores_of(found), scores, strict=True):
            assert one == pytest.approx(other, rel=1e-3), (stage, world_size)


def test_score__of_a_step__is_that_of_its_checkpoint(
    corpus: CorpusInfo, tasks: dict[str, str], tmp_path: Path
) -> None:
    plan = plan_of(corpus, tasks, stage=3)
    run = tmp_path / "run"
    found = run_ranks(plan, run / "checkpoints", world_size=1)
    (run / "plan.json").write_text(plan_to_json(plan))
    (run / "tokenizer").symlink_to(Path(corpus.folder) / "tokenizer")
    answer = ShardAnswerer(load(run))
    for path, text in tasks.items():
        task = build_task(load_task_text(text, path=path))
        shards = TaskShards(task=task, data=task.examples())
        outputs = shards.scored([answer(inputs, report=lambda: None) for inputs in shards.inputs()])
        for name, value in score_task(shards, outputs).items():
            own = scores_of(found)[-1][f"evaluate/{task.spec.name}/{name}"]
            assert own == pytest.approx(value.value, rel=1e-6), "fp32 on another number of threads"


def test_score__metric_of_a_task__stops_early_and_chooses_the_best(
    corpus: CorpusInfo, tasks: dict[str, str], tmp_path: Path
) -> None:
    stopping = {"metric": "evaluate/text/bits_per_byte", "patience": 1, "min_delta": 100.0}
    plan = plan_of(corpus, tasks, training__early_stopping=stopping)
    found = run_ranks(plan, tmp_path / "run", world_size=1)
    assert [step.step for step in found.steps][-1] == 4, "the second evaluation is no better by 100"
    wrong = plan_of(corpus, tasks, training__early_stopping=stopping | {"metric": "evaluate/text/bleu"})
    with pytest.raises(ForgeError, match="the tasks have no evaluate/text/bleu; they have evaluate/text/bits"):
        run_ranks(wrong, tmp_path / "wrong", world_size=1)
