"""Intervals and p-values: coverage, seeds, blocks, sacrebleu's p-values, and models that do not differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.config.task_metrics import MetricsSpec
from forge.evaluate import bootstrap
from forge.evaluate.bootstrap import p_values, resample, score_metric
from forge.evaluate.metrics.base import Metric, ScoredExample
from forge.evaluate.metrics.build import build_metrics

sacrebleu = pytest.importorskip("sacrebleu")
RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text(encoding="utf-8"))
TEXTS = [
    ScoredExample(prediction=one, target=tuple(references[:1])) for one, references in RECORDED["translations"]
]


def metric_of(name: str, examples: list[ScoredExample]) -> Metric:
    return build_metrics(MetricsSpec.model_validate(name), examples=examples)[name]


def answers(right: list[bool]) -> list[ScoredExample]:
    return [ScoredExample(prediction="a" if one else "b", target="a") for one in right]


def p_of(
    metric: Metric, first: list[ScoredExample], second: list[ScoredExample], *, num_resamples: int = 1000
) -> dict[str, float]:
    found = (resample(metric, one, num_resamples=num_resamples) for one in (first, second))
    return p_values(*found)


def test_intervals__of_a_share__cover_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(7)
    num_covered = 0
    for _ in range(100):
        examples = answers((draw.random(80) < 0.3).tolist())
        score = score_metric(metric_of("accuracy", examples), examples, num_resamples=200)["accuracy"]
        num_covered += score.low <= 0.3 <= score.high
    assert 86 <= num_covered <= 100


def test_intervals__blocks_of_any_height__are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for values in (1, 200, 1 << 22):
        monkeypatch.setattr(bootstrap, "_BLOCK_VALUES", values)
        found.append(score_metric(metric_of("bleu", TEXTS), TEXTS, num_resamples=50))
    assert found[0] == found[1] == found[2]


def test_intervals__same_seed__are_the_same_and_others_differ() -> None:
    metric = metric_of("chrf", TEXTS)
    first, second, other = (score_metric(metric, TEXTS, seed=one, num_resamples=50)["chrf"] for one in (1, 1, 2))
    assert first == second and first.value == other.value and (first.low, first.high) != (other.low, other.high)


def test_intervals__undefined_resamples__are_left_out() -> None:
    examples = [ScoredExample(prediction=1.0, target=1.0), ScoredExample(prediction=2.0, target=3.0)]
    score = score_metric(metric_of("pearson", examples), examples)["pearson"]
    assert score.value == pytest.approx(1) and score.low == pytest.approx(1)  # half of them have no spread


def test_p_values__bleu__are_near_those_of_sacrebleu() -> None:
    from sacrebleu.significance import PairedTest

    worse = [ScoredExample(prediction=str(one.prediction)[:-12], target=one.target) for one in TEXTS]
    systems = [("a", [str(one.prediction) for one in TEXTS]), ("b", [str(one.prediction) for one in worse])]
    references = [[str(one.target[0]) for one in TEXTS]]  # type: ignore[index]
    test = PairedTest(systems, {"BLEU": sacrebleu.BLEU()}, references, test_type="bs", n_samples=2000)
    _, scores = test()
    expected = next(one for name, results in scores.items() if name == "BLEU" for one in results[1:])
    found = p_of(metric_of("bleu", TEXTS), TEXTS, worse, num_resamples=2000)["bleu"]
    # sacrebleu counts differences in one direction only; its p is half as large if they are symmetric.
    assert found == pytest.approx(2 * expected.p_value, abs=0.06)


def test_p_values__equal_models__are_1_and_clear_differences_small() -> None:
    good, bad = answers([True] * 60 + [False] * 10), answers([True] * 20 + [False] * 50)
    metric = metric_of("accuracy", good)
    assert p_of(metric, good, good) == {"accuracy": 1.0}
    assert p_of(metric, good, bad)["accuracy"] <= 0.002
    assert p_of(metric, good, bad) == p_of(metric, bad, good)


def test_p_values__models_that_do_not_differ__are_spread_evenly() -> None:
    draw = np.random.default_rng(11)
    found, metric = [], metric_of("accuracy", [])
    for _ in range(60):
        one, other = ((draw.random(100) < 0.5).tolist() for _ in range(2))
        found.append(p_of(metric, answers(one), answers(other), num_resamples=200)["accuracy"])
    assert sum(p < 0.05 for p in found) <= 9 and 0.3 < np.mean(found) < 0.75


def test_p_values__numbers_that_differ_and_undefined_scores__are_refused_or_nan() -> None:
    metric: Any = metric_of("accuracy", [])
    with pytest.raises(ValueError, match="cannot be paired"):
        p_of(metric, answers([True]), answers([]))
    assert math.isnan(p_of(metric, [], [])["accuracy"])
    broken = [ScoredExample(prediction=None, target=1.0)]
    assert math.isnan(p_of(metric_of("mse", broken), broken, broken)["mse"])
