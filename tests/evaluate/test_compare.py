"""The table of several models: p-values, differences of jobs, and formats that hostile names do not break."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from forge.config.load import load_task_text
from forge.config.task import TaskSpec
from forge.evaluate.compare import Comparison, EvaluatedModel, TaskOutputs, compare
from forge.evaluate.metrics.base import ScoredExample
from forge.evaluate.table import cells_of, header_of, number, to_latex, to_markdown

IDS = tuple(map(str, range(40)))


def task(name: str = "quiz", metrics: str = "accuracy") -> TaskSpec:
    text = f"name: {name}\nkind: classify\ndata: {{files: a}}\nprompt: q\ntarget: a\nmetrics: {metrics}\n"
    return load_task_text(text, path="t.yaml").task


def outputs(num_right: int, ids: tuple[str, ...] = IDS) -> TaskOutputs:
    examples = [ScoredExample(prediction="a" if at < num_right else "b", target="a") for at in range(len(ids))]
    return TaskOutputs(ids=ids, examples=tuple(examples))


def model(name: str, num_right: int, job: Mapping[str, Any] | None = None, **more: Any) -> EvaluatedModel:
    return EvaluatedModel(name=name, outputs={"quiz": outputs(num_right, **more)}, job=job)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    jobs: list[dict[str, Any]] = [
        {"name": name, "training": {"optimizer": {"lr": lr}, "total_steps": 10}}
        for name, lr in (("a", 1), ("b", 2))
    ]
    return compare([model("first", 10, jobs[0]), model("second", 35, jobs[1]), model("third", 10)], tasks=[task()])


def test_compare__models__have_scores_p_values_and_the_best_marked(comparison: Comparison) -> None:
    (first,), (second,), (third,) = comparison.rows
    assert first is not None and second is not None and third is not None
    assert (first.score, second.score) == (0.25, 0.875)
    assert first.p_value is None and second.p_value is not None and second.p_value < 0.01
    assert third.p_value == 1 and [first.is_best, second.is_best, third.is_best] == [False, True, False]
    assert comparison.notes == () and comparison.columns[0].num_examples == 40


def test_compare__jobs__differ_in_named_keys(comparison: Comparison) -> None:
    assert [(one.key, one.values) for one in comparison.differences] == [("training.optimizer.lr", (1, 2, None))]


def test_compare__other_examples__have_no_p_value_but_a_note() -> None:
    other = tuple(f"x{one}" for one in IDS)
    found = compare([model("a", 1), model("b", 2, ids=other)], tasks=[task()])
    assert found.rows[1][0] is not None and found.rows[1][0].p_value is None
    assert found.notes == ("quiz: a and b were asked different examples, so they have no p-value",)


def test_compare__missing_task__is_an_empty_cell() -> None:
    absent = EvaluatedModel(name="b", outputs={})
    found = compare([model("a", 1), absent], tasks=[task()])
    assert found.rows[1] == (None,) and cells_of(found)[1] == ["b", "–"]


def test_compare__classes_of_all_models__are_columns() -> None:
    found = compare([model("a", 40), model("b", 1)], tasks=[task(metrics="{f1: {per_class: true}}")])
    assert [column.value_name for column in found.columns] == ["f1_macro", "f1/a", "f1/b"]


def test_formats__one_table__has_the_same_numbers(comparison: Comparison) -> None:
    assert header_of(comparison) == ["model", "quiz accuracy ↑"]
    plain, markdown, latex = cells_of(comparison), to_markdown(comparison), to_latex(comparison)
    assert re.fullmatch(r"0\.875 \[0\.\d{3}, 0\.\d{3}\] p=0\.\d{3}", plain[1][1])
    assert "| second | **0.875** [" in markdown and "| `training.optimizer.lr` | 1 | 2 | – |" in markdown
    assert r"\textbf{0.875}$^{**}$" in latex and "against first" in markdown
    body = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert body["rows"][1]["cells"][0]["score"] == 0.875
    assert body["differences"] == {"training.optimizer.lr": {"first": 1, "second": 2, "third": None}}


HOSTILE = "a|b_c & 50% \\ $x$ {#~^}\n\x1b[31m`<script>`"


def test_formats__hostile_name__breaks_no_table() -> None:
    found = compare([model(HOSTILE, 1), model("b", 2)], tasks=[task()])
    row = to_markdown(found).splitlines()[2]
    assert (
        len(re.findall(r"(?<!\\)\|", row)) == 3 and "\x1b" not in row and "<script>" not in row.replace("\\<", "")
    )
    line = next(line for line in to_latex(found).splitlines() if line.startswith("a|b"))
    assert len(re.findall(r"(?<!\\)&", line)) == 1 and not re.search(
        r"(?<!\\)[%#$](?![\^$])", line.partition(" & ")[0]
    )
    assert "\x1b" not in "".join(cells_of(found)[0]) + to_latex(found)


def test_to_json__undefined_scores__are_null() -> None:
    empty = EvaluatedModel(name="a", outputs={"quiz": TaskOutputs(ids=(), examples=())})
    body = compare([empty], tasks=[task()]).to_json()
    assert json.loads(json.dumps(body, allow_nan=False))["rows"][0]["cells"][0]["score"] is None
    assert cells_of(compare([empty], tasks=[task()]))[0][1] == "– [–, –]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (27.433, "27.43"),
        (123.44, "123.4"),
        (12345.6, "12346"),
        (float("inf"), "∞"),
        (2e9, "2e+09"),
    ],
)
def test_number__sizes__keep_three_digits(value: float, text: str) -> None:
    assert number(value) == text
