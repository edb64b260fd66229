"""Reading the results of lm-eval, and what its adapter refuses; without the harness."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from forge.errors import ArgumentError
from forge.evaluate import lm_eval
from forge.evaluate.lm_eval import run_lm_eval

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
