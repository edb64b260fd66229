"""Reading the results of lm-eval, and what its adapter refuses; without the harness."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from forge.errors import ArgumentError
from forge.evaluate import lm_eval
from forge.evaluate.client import EvaluateOptions, evaluate_models
from forge.evaluate.compare import EvaluatedModel, compare
from forge.evaluate.lm_eval import run_lm_eval, with_lm_eval
from forge.evaluate.table import cells_of, header_of

RESULTS = {
    "results": {
        "quiz": {
            "alias": "quiz",
            "sample_len": 12,
            "acc,none": 0.25,
            "acc_stderr,none": 0.125,
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": "N/A",
        }
    },
    "higher_is_better": {"quiz": {"acc": True}},
    "n-shot": {"quiz": 2},
    "versions": {"quiz": 1.0},
    "n-samples": {"quiz": {"original": 20, "effective": 12}},
    "lm_eval_version": "0.4.13",
}


def test_scores__results_of_the_harness__are_read() -> None:
    first, second = lm_eval._scores(RESULTS)
    assert (first.metric, first.value, first.stderr, first.direction) == ("acc", 0.25, 0.125, "max")
    assert first.signature == "lm-eval 0.4.13|task:quiz 1.0|shots:2" and first.num_examples == 12
    assert second.metric == "exact_match,strict-match" and math.isnan(second.stderr) and second.direction is None


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("a,b", "is neither the name of an lm-eval task nor a YAML file"),
        ("", "is neither"),
        ("../x", "is neither"),
        ("missing.yaml", "does not exist"),
    ],
)
def test_run_lm_eval__wrong_task__is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, problem: str
) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: object())
    with pytest.raises(ArgumentError, match=problem):
        run_lm_eval(tmp_path, tasks=[task])


def test_run_lm_eval__not_installed__says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'forge-train\[lm-eval\]'"):
        run_lm_eval(tmp_path, tasks=["hellaswag"])


def test_with_lm_eval__scores_of_two_models__are_columns_with_intervals() -> None:
    empty = compare([EvaluatedModel(name=name, outputs={}) for name in "ab"], tasks=[])
    better = {**RESULTS, "results": {"quiz": {"acc,none": 0.75, "acc_stderr,none": 0.1}}}
    found = with_lm_eval(empty, [list(lm_eval._scores(one)) for one in (RESULTS, better)])
    assert header_of(found) == ["model", "quiz acc ↑", "quiz exact_match,strict-match ↑"]
    assert cells_of(found) == [["a", "0.250 [0.005, 0.495]", "0.500 [–, –]"], ["b", "0.750 [0.554, 0.946]", "–"]]
    (first, _), (second, _) = found.rows
    assert first is not None and second is not None and not first.is_best and second.is_best
    assert "no p-values" in found.notes[0]


def test_evaluate_models__lm_eval_with_other_options__is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: object())
    with pytest.raises(ArgumentError, match="run on this machine"):
        evaluate_models([tmp_path], ["lm-eval:hellaswag"], options=EvaluateOptions(ema=True))
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="need their harness"):
        evaluate_models([tmp_path], ["lm-eval:hellaswag"], options=EvaluateOptions())
