"""forge.evaluate: models are asked in shards, and the scores do not depend on the machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forge.cluster.local.ray_cluster import add_node, kill_node, start_head_alone, stop_local
from forge.config.load import load_task_text
from forge.config.resources import WandbSpec
from forge.data.tokenizer import train_tokenizer
from forge.errors import ArgumentError, JobFileError
from forge.evaluate.client import EvaluateOptions, Evaluation, evaluate_models, find_task
from forge.evaluate.results import read_outputs, score_task, task_digest, write_answers
from forge.evaluate.shards import TaskShards
from forge.evaluate.task import build_task
from forge.evaluate.worker import EvaluationWorker
from forge.inference.identity import identify
from forge.inference.loaded import load
from forge.runs.find_model import find_model
from forge.runs.scores import TaskScore, TaskValue, append_score, newest_scores, read_scores
from forge.runs.trackers.wandb_tracker import log_scores, scores_sent
from tests.inference.conftest import write_model
from tests.support.wandb_file import read_groups, read_history

TEXTS = [
    f"The river {number} runs through the town to the sea, and train {number} follows." for number in range(80)
]
TASKS = {
    "write": """
kind: generate
prompt: question
target: answer
sampling: {max_tokens: 12}
metrics: {bleu: {}, rouge: {}, exact_match: {}}
""",
    "choose": """
kind: multiple-choice
prompt: question
choices: options
target: answer
metrics: {accuracy: {}, normalized_accuracy: {}}
""",
    "text": """
kind: log-likelihood
target: question
metrics: {perplexity: {}, bits_per_byte: {}}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model with random weights, tasks and their data."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=256, initializer_range=0.3,
        eos_token_id=tokenizer.eot_id, bos_token_id=None, **sizes,
    )  # fmt: skip
    write_model(folder / "model", LlamaForCausalLM(config), tokenizer)
    records = [
        {"question": text, "answer": str(number), "options": [str(number), "the sea", "a train"]}
        for number, text in enumerate(TEXTS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\ndata: {{files: {folder / 'data.jsonl'}}}\n{text}")
    return folder


def shards_of(folder: Path, name: str, more: str = "") -> TaskShards:
    task = build_task(load_task_text((folder / f"{name}.yaml").read_text() + more, path=name))
    return TaskShards(task=task, data=task.examples())


@pytest.fixture(scope="module")
def worker(folder: Path) -> EvaluationWorker:
    return EvaluationWorker({"source": str(folder / "model"), "packed": None, "device": "cpu"})


@pytest.mark.parametrize("name", TASKS)
def test_worker__shards_of_a_task__score_as_one(folder: Path, worker: EvaluationWorker, name: str) -> None:
    shards = shards_of(folder, name)
    assert shards.count == 3
    inputs = list(shards.inputs())
    assert json.loads(json.dumps(inputs)) == inputs and [len(one["examples"]) for one in inputs] == [32, 32, 16]
    results = [json.loads(json.dumps(worker(one, report=lambda: None))) for one in inputs]
    outputs = shards.scored(results)
    shuffled = [json.loads(json.dumps(worker(one, report=lambda: None))) for one in inputs[::-1]][::-1]
    assert shards.scored(shuffled) == outputs
    values = score_task(shards, outputs)
    assert all(value.low is not None and value.value is not None for value in values.values())
    write_answers(folder / name / "answers.jsonl", shards, outputs)
    assert read_outputs(folder / name / "answers.jsonl").examples == tuple(outputs)


def test_inputs__other_metrics_and_targets__ask_the_same(folder: Path) -> None:
    one, other = shards_of(folder, "write"), shards_of(folder, "write", "seed: 2\n")
    assert list(one.inputs()) == list(other.inputs())
    assert task_digest(one) != task_digest(other)


def test_identify__folder__is_what_is_loaded(folder: Path) -> None:
    found, loaded = identify(folder / "model"), load(folder / "model", device="cpu")
    assert (found.name, found.kind, found.digest) == (loaded.name, loaded.kind, loaded.digest)


def test_find_task__unknown_name__names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs" / "eval").mkdir(parents=True)
    (tmp_path / "jobs" / "eval" / "summaries.yaml").touch()
    assert find_task("summaries") == Path("jobs/eval/summaries.yaml")
    with pytest.raises(ArgumentError, match="did you mean summaries"):
        find_task("sumaries")
    for odd, problem in (
        ("a" * 300, "no task file aaa"),
        ("a\0b", "no task file a"),
        ("~nouser1/x.yaml", "no user"),
    ):
        with pytest.raises(ArgumentError, match=problem):
            find_task(odd)
        with pytest.raises(ArgumentError):
            find_model(odd, root=tmp_path)


def test_evaluate_models__held_out_records_of_a_folder__are_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    task = Path(__file__).parents[2] / "jobs" / "eval" / "text.yaml"
    with pytest.raises(
        JobFileError, match=r"text\.yaml:\d+: data\.held_out: means the records that a run held out"
    ):
        evaluate_models([tmp_path], [task], options=EvaluateOptions())
    with pytest.raises(ArgumentError, match=r"--tasks has .*text\.yaml twice"):
        evaluate_models([tmp_path], [task, task], options=EvaluateOptions())


def score(**changes: Any) -> TaskScore:
    value = TaskValue(value=0.5, low=0.4, high=None, direction="max", num_examples=3, signature="accuracy")
    values: dict[str, Any] = {
        "task": "t", "kind": "classify", "model": "m", "step": 3, "ema": False, "model_digest": "d",
        "task_digest": "e", "values": {"accuracy": value}, "num_examples": 3, "num_skipped": 0,
        "contamination": None, "examples": "x",
    }  # fmt: skip
    return TaskScore(**values | changes)


@pytest.mark.parametrize(
    ("task", "options", "problem"),
    [
        (None, {"step": 5}, "--step is for checkpoints of runs, and folders of weights have none"),
        (None, {"ema": True}, "--ema is for checkpoints of runs"),
        (None, {"contamination": True}, "--contamination would change nothing: the training data of a folder"),
        ("lm-eval:arc_easy", {"num_workers": 2}, "lm-eval scores in one process"),
    ],
)
def test_evaluate_models__option_without_effect__is_refused_before_anything_starts(
    tmp_path: Path, task: str | None, options: dict[str, Any], problem: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = [task or Path(__file__).parents[2] / "jobs" / "eval" / "sections-few-shot.yaml"]
    with pytest.raises(ArgumentError, match=problem):
        evaluate_models([tmp_path], tasks, options=EvaluateOptions(**options))


def test_append_score__again_and_changed__is_written_once_each(tmp_path: Path) -> None:
    first = append_score(tmp_path, score())
    assert append_score(tmp_path, score()) == first
    append_score(tmp_path, score(task_digest="f"))
    append_score(tmp_path, score(step=9, model_digest="g"))
    with (tmp_path / "evaluation.jsonl").open("a") as file:
        file.write('{"task": 3}\nnot JSON\n')
    assert len((tmp_path / "evaluation.jsonl").read_text().splitlines()) == 5
    found = read_scores(tmp_path)
    assert [(one.step, one.task_digest) for one in found] == [(3, "f"), (9, "e")]
    assert [one.step for one in newest_scores(found)] == [9]


@pytest.fixture
def cluster() -> Iterator[None]:
    start_head_alone()
    yield
    stop_local()


def scores_of(evaluation: Evaluation) -> dict[str, Any]:
    """Scores and answers, without the time."""
    (model,) = evaluation.models
    answers = {one.task: (model.folder / one.examples).read_bytes() for one in model.scores}
    return {one.task: (one.values, one.model_digest, one.task_digest, answers[one.task]) for one in model.scores}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_evaluate__machine_is_killed_and_another_joins__scores_are_those_of_one_worker(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    found = []
    for number in (1, 3):
        monkeypatch.setenv("FORGE_CACHE", str(tmp_path / f"cache{number}"))
        nodes = [add_node() for _ in range(number if number == 1 else 2)]
        killed: list[str] = []
        messages: list[str] = []

        def on_progress(done: int, total: int, *, nodes: Any = nodes, killed: Any = killed) -> None:
            if len(nodes) > 1 and not killed and done >= 2:
                killed.append("node")
                kill_node(nodes[0])
                add_node()

        found.append(
            evaluate_models(
                [folder / "model"],
                [folder / f"{name}.yaml" for name in TASKS],
                options=EvaluateOptions(num_workers=number),
                on_message=messages.append,
                on_progress=on_progress,
            )
        )
        assert bool(killed) == (number > 1)
    assert scores_of(found[0]) == scores_of(found[1])
    again: list[str] = []
    repeated = evaluate_models(
        [folder / "model"],
        [folder / f"{name}.yaml" for name in TASKS],
        options=EvaluateOptions(),
        on_message=again.append,
    )
    assert scores_of(repeated) == scores_of(found[1])
    assert any("9 of 9 shards answered before" in message for message in again)


@pytest.mark.slow
def test_log_scores__offline__are_a_run_of_w_and_b_with_the_steps_of_the_checkpoints(tmp_path: Path) -> None:
    spec = WandbSpec(mode="offline", project="p")
    scores = [score(step=9), score(step=3), score(step=3, task="u")]
    assert log_scores(spec, folder=tmp_path, run_id="tiny-1", scores=scores) is None
    (path,) = tmp_path.glob("wandb/offline-run-*/run-tiny-1-tasks.wandb")
    rows = [{key: row[key] for key in row if not key.startswith("_")} for row in read_history(path)]
    assert rows == [{"step": 3, "t/accuracy": 0.5, "u/accuracy": 0.5}, {"step": 9, "t/accuracy": 0.5}]
    assert scores_sent(tmp_path, run_id="tiny-1") >= {(3, "t"), (3, "u"), (9, "t")}
    assert read_groups(path)[-1] == "tiny-1"
