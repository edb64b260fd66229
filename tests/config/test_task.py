"""Task files of `forge eval`: what is accepted, and what errors say."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from forge.config.load import load_task_text
from forge.config.schema import task_schema
from forge.config.task_metrics import MetricsSpec
from forge.config.yaml_reader import compose
from forge.errors import JobFileError

FULL = """\
name: questions
kind: generate
data: {files: questions.jsonl, on_bad_record: skip}
instruction: Answer with a number.
prompt: |
  Question: {{ question }}
  Answer:
target: answer
few_shot: {num: 2}
sampling: {max_tokens: 1k, stop: "\\n\\n"}
answer: number
metrics: [accuracy, mse]
limit: 1k
"""


def load(text: str) -> Any:
    return load_task_text(text, path="task.yaml").task


def problems_of(text: str) -> str:
    with pytest.raises(JobFileError) as caught:
        load(text)
    return str(caught.value)


def test_load_task__full_file__has_typed_values() -> None:
    task = load(FULL)
    assert task.sampling.max_tokens == task.limit == 1000
    assert task.sampling.stop == ("\n\n",)
    assert task.answer.read == "number"
    assert list(task.metrics.chosen) == ["accuracy", "mse"]
    assert task.data.as_data().files == ("questions.jsonl",)


@pytest.mark.parametrize(
    ("metrics", "chosen"),
    [
        ("bleu", {"bleu": {}}),
        ("[chrf, bleu]", {"bleu": {}, "chrf": {}}),
        ("{rouge: {stem: true}, bleu: }", {"bleu": {}, "rouge": {"stem": True}}),
    ],
)
def test_load_task__forms_of_metrics__are_the_same(metrics: str, chosen: dict[str, Any]) -> None:
    text = FULL.replace("[accuracy, mse]", metrics)
    found = load(text).metrics.chosen
    assert {name: options.model_dump(exclude_defaults=True) for name, options in found.items()} == chosen
    body = compose(text, path="task.yaml", errors=[]).plain()
    assert list(jsonschema.Draft202012Validator(task_schema()).iter_errors(body)) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("prompt: |", "promt: |", "task.yaml:5: promt: unknown key; did you mean 'prompt'?"),
        ("kind: generate", "kind: generates", "task.yaml:2: kind: must be 'generate'"),
        ("files: q", "held_out: true, files: q", "task.yaml:3: data: give one of 'held_out: true'"),
        ("[accuracy, mse]", "[acuracy]", "task.yaml:12: metrics: 'acuracy' is not a metric"),
        ("[accuracy, mse]", "[]", "task.yaml:12: metrics: must name at least one metric"),
        ("[accuracy, mse]", "{f1: {average: makro}}", "metrics.f1.average: must be one or several of macro"),
        ("[accuracy, mse]", "{mse: {x: 1}}", "metrics.mse.x: unknown key; 'metrics.mse' has no keys"),
        ("[accuracy, mse]", "[mrr]", "metrics.mrr: is only for kind: embed, not generate"),
        ("answer: number", "answer: whole", "metrics.mse: is only for numbers"),
        ("answer: number", "answer: label", "choices: is missing; give the texts to choose from"),
        ("answer: number", "answer: {read: regex}", "answer.pattern: is missing; read: regex needs it"),
        ("answer: number", "answer: {read: json, field: a, which: last}", "answer.which: is not for read: json"),
        ("limit: 1k", "choices: options", "choices: is not for kind: generate without answer: label"),
        ("limit: 1k", "text_pair: b", "text_pair: is only for kind: classify, not generate"),
        ("max_tokens: 1k", "num_beams: 2, temperature: 1", "sampling.temperature: must be 0 with beam search"),
        ("max_tokens: 1k", "top_p: 0.5", "sampling.top_p: changes nothing at temperature 0"),
        ("max_tokens: 1k", "top_k: 5, temperature: 0", "sampling.top_k: changes nothing at temperature 0"),
        ("name: questions", "name: Questions 1", "name: must have lower-case letters"),
    ],
)
def test_load_task__wrong_value__is_named_with_its_line(old: str, new: str, problem: str) -> None:
    assert old in FULL
    assert problem in problems_of(FULL.replace(old, new))


def test_load_task__missing_parts__are_all_named() -> None:
    found = problems_of("kind: classify\n")
    assert all(f" {key}: is missing" in found for key in ("name", "data", "target", "metrics")), found


def test_load_task__secret_looking_or_nested_input__is_refused_not_crashed() -> None:
    assert "task.yaml" in problems_of("[" * 500 + "]" * 500)
    assert "task.yaml" in problems_of("name: &a [*a]\n")


def test_task_schema__itself__is_valid_and_names_every_metric() -> None:
    schema = task_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["metrics"]["anyOf"][1]["enum"] == list(MetricsSpec.model_fields)
    assert not list(jsonschema.Draft202012Validator(schema).iter_errors(compose(FULL, path="", errors=[]).plain()))
