"""Examples of tasks: prompts, targets, few-shot examples, limits, and records that cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.config.load import load_task_text
from forge.errors import ArgumentError, DataError, JobFileError
from forge.evaluate.task import Task, TaskExamples, build_task

Build = Callable[..., Task]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build(records: list[dict[str, Any]], text: str) -> Task:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        given = f"name: t\ndata: {{files: {path}, on_bad_record: skip}}\n{text}"
        return build_task(load_task_text(given, path="task.yaml"))

    return build


QUESTIONS = [{"question": f"{number}+1?", "answer": str(number + 1)} for number in range(20)]
GENERATE = "kind: generate\nprompt: |\n  Q: {{ question }}\n  A:\ntarget: answer\nmetrics: exact_match\n"


def prompts(found: TaskExamples) -> list[str]:
    return [example.prompt for example in found.examples]


def test_examples__templates__are_rendered_over_the_fields(build: Build) -> None:
    found = build(QUESTIONS, GENERATE).examples()
    assert prompts(found)[3] == "Q: 3+1?\nA:"
    assert found.examples[3].target == "4" and found.examples[3].id == "data.jsonl:4"
    assert found.num_records == 20 and found.num_skipped == 0


def test_examples__limit__draws_the_same_ones_in_their_order(build: Build) -> None:
    first, second = (build(QUESTIONS, GENERATE + "limit: 5\n").examples() for _ in range(2))
    assert first == second and len(first.examples) == 5 and first.num_records == 20
    numbers = [int(example.id.partition(":")[2]) for example in first.examples]
    assert numbers == sorted(numbers) != list(range(1, 6))
    assert build(QUESTIONS, GENERATE + "limit: 5\nseed: 2\n").examples().examples != first.examples


def test_examples__few_shot_of_own_data__are_never_scored(build: Build) -> None:
    found = build(QUESTIONS, GENERATE + "few_shot: {num: 2}\ninstruction: Add.\nlimit: 18\n").examples()
    assert len(found.examples) == 18
    instruction, *shots, last = found.examples[0].prompt.split("\n\n")
    assert instruction == "Add." and last.endswith("?\nA:") and len(shots) == 2
    asked = {prompt.rpartition("\n\n")[2] for prompt in prompts(found)}
    assert not asked & {shot.rpartition(" ")[0] for shot in shots}, "a shot is a question of the test"
    assert all(shot.rpartition(" ")[2] == str(int(shot[3 : shot.index("+")]) + 1) for shot in shots)
    with pytest.raises(DataError, match=r"few_shot\.num is 50, more than the 20 records to take from"):
        build(QUESTIONS, GENERATE + "few_shot: {num: 50}\n").examples()


def test_examples__chat__has_turns(build: Build) -> None:
    text = GENERATE + "few_shot: {num: 1}\ninstruction: Add.\nprompt_format: chat\n"
    messages = build(QUESTIONS, text).examples().examples[0].messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]


def test_examples__choices__are_found_by_text_or_number(build: Build) -> None:
    records: list[dict[str, Any]] = [
        {"q": "x", "options": ["a", "b"], "right": right} for right in ("b", 1, "1", True)
    ]
    records += [{"q": "x", "options": ["a", "b"], "right": wrong} for wrong in ("c", 2, -1, None, 0.5)]
    records += [{"q": "x", "options": [], "right": 0}, {"q": "x", "right": 0}]
    records += [{"q": "x", "options": ["a", "a"], "right": 0}]
    text = "kind: multiple-choice\nprompt: q\ntarget: right\nchoices: options\nmetrics: accuracy\n"
    found = build(records, text).examples()
    assert [example.target for example in found.examples] == ["b"] * 4
    assert found.examples[0].continuations == (" a", " b")
    assert found.num_skipped == len(found.skipped) == 8 and "data.jsonl:5: the target 'c'" in found.skipped[0]


def test_examples__list_of_choices__may_have_templates(build: Build) -> None:
    text = 'kind: multiple-choice\nprompt: q\ntarget: right\nchoices: ["{{ q }}!", none]\nmetrics: accuracy\n'
    found = build([{"q": "x", "right": "x!"}], text).examples()
    assert found.examples[0].choices == ("x!", "none")


def test_examples__log_likelihood__scores_the_target_after_the_prompt(build: Build) -> None:
    text = "kind: log-likelihood\nprompt: a\ntarget: b\nmetrics: perplexity\n"
    found = build([{"a": "x", "b": "y"}, {"a": "x ", "b": "y"}, {"a": "", "b": "y"}], text).examples()
    assert [example.continuations for example in found.examples] == [(" y",), ("y",), ("y",)]


def test_examples__texts_that_belong__are_candidates_of_all(build: Build) -> None:
    text = "kind: embed\nprompt: q\ntarget: d\nchoices: n\nmetrics: [mrr, ndcg]\n"
    found = build(
        [{"q": "1", "d": "a", "n": ["x"]}, {"q": "2", "d": {"b": 2, "a": 1}, "n": ["a", "y"]}], text
    ).examples()
    assert found.candidates == ("a", "b", "x", "y")
    assert found.examples[1].gains == (2.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("single", 1, "1"),
        ("single", True, "true"),
        ("multi", [], ()),
        ("multi", ["a", 2], ("a", "2")),
        ("token", ["N", None], ("N", None)),
        ("regression", 2, 2.0),
    ],
)
def test_examples__labels__have_the_names_of_training(build: Build, kind: str, target: Any, expected: Any) -> None:
    metrics = "mse" if kind == "regression" else "accuracy"
    text = f"kind: classify\nprompt: text\ntarget: label\nlabel_kind: {kind}\nmetrics: {metrics}\n"
    words: Any = ["a", "b"] if kind == "token" else "a b"
    example = build([{"text": words, "label": target}], text).examples().examples[0]
    assert example.target == expected and (example.words == ("a", "b")) is (kind == "token")


def test_examples__targets_of_numbers_and_labels__are_normal(build: Build) -> None:
    number = GENERATE + "answer: number\n"
    assert build([{"question": "?", "answer": "1,000.0"}], number).examples().examples[0].target == "1000"
    label = GENERATE + "answer: label\nchoices: [Yes, No]\n"
    found = build([{"question": "?", "answer": "yes"}, {"question": "?", "answer": "maybe"}], label).examples()
    assert found.examples[0].target == "Yes" and "none of the choices" in found.skipped[0]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"answer": "1"}, "'question' is undefined"),
        ({"question": None, "answer": "1"}, "a field is null"),
        ({"question": "?", "answer": None}, "'target' must be a text, not NoneType"),
        ({"question": "?", "answer": []}, "a list of texts that is not empty"),
        ({"question": "?"}, "no key 'answer' (target)"),
        ({"question": math.nan, "answer": "1"}, "a number is nan"),
        ({"question": "?", "answer": [math.inf]}, "'target' is inf, which is neither a text nor a number of JSON"),
    ],
)
def test_examples__unusable_records__are_skipped_with_reason(build: Build, record: Any, problem: str) -> None:
    found = build([record, *QUESTIONS], GENERATE).examples()
    assert found.num_skipped == 1 and len(found.examples) == 20
    assert problem in found.skipped[0] and found.skipped[0].split(": ")[0].endswith("data.jsonl:1")
    with pytest.raises(DataError, match="no examples"):
        build([record], GENERATE).examples()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{% for a in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{{ 9**99**9**9 }}",  # constants, which Jinja would compute without a limit when it compiles the template
        "{{ ('a' * 10**10) | length }}",
        "{{ [1] * 10**9 }}",
        "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ lipsum() }}",
    ],
)
def test_examples__hostile_template__is_stopped(build: Build, template: str) -> None:
    text = f'kind: generate\nprompt: "{template}"\ntarget: answer\nmetrics: exact_match\n'
    with pytest.raises(DataError, match="no examples"):
        build(QUESTIONS[:1], text).examples()


def test_examples__braces_in_the_data__are_text(build: Build) -> None:
    found = build([{"question": "{{ answer }}", "answer": "x"}], GENERATE).examples()
    assert prompts(found) == ["Q: {{ answer }}\nA:"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GENERATE.replace("{{ question }}", "{{ question"), "task.yaml:4: prompt: is not a Jinja template"),
        (
            GENERATE.replace("{{ question", "{{ question | random"),
            "prompt: is not a Jinja template: No filter named",
        ),
        (GENERATE + "answer: {read: regex, pattern: '('}\n", "task.yaml:9: answer.pattern: is not a regular"),
        (GENERATE + "answer: label\nchoices: options\n", "task.yaml:10: choices: must be a list of labels"),
    ],
)
def test_build_task__wrong_template_or_pattern__is_named_with_its_line(
    build: Build, text: str, problem: str
) -> None:
    with pytest.raises(JobFileError) as caught:
        build(QUESTIONS, text)
    assert problem in str(caught.value)


def test_examples__held_out__needs_a_run() -> None:
    task = build_task(load_task_text("name: t\ndata: {held_out: true}\n" + GENERATE, path="task.yaml"))
    with pytest.raises(ArgumentError, match="the records that a run held out"):
        task.examples()


def test_digest__what_a_model_is_asked__decides(build: Build) -> None:
    first, second = (build(QUESTIONS, GENERATE.replace("Q:", name)).examples() for name in ("Q:", "Question:"))
    digests = {example.digest for example in (*first.examples, *second.examples)}
    assert len(digests) == 40
