"""Metrics of objectives: their names and values are checked, and none replaces a built-in one."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from forge.errors import RunError
from forge.objective.base import derived_metrics
from forge.train.engine import Engine
from tests.support.runs import metrics


def objective_that_derives(derived: dict[str, Any]) -> Any:
    return SimpleNamespace(metric_directions={"hits": "max", "rate": "max"}, derived=lambda means: derived)


@pytest.mark.parametrize(
    ("derived", "problem"),
    [
        ({"loss": 0.0}, "'loss', which it must not replace"),
        ({"tokens": 0.0}, "'tokens', which it must not replace"),
        ({"hits": 0.0}, "'hits', which it must not replace"),
        ({"other": 0.0}, "'other', which its metric_directions do not name"),
        ({"rate": "high"}, "'rate', which must be a number, not str"),
        ({"rate": True}, "'rate', which must be a number, not bool"),
    ],
)
def test_derived_metrics__unusable_metric__is_refused(derived: dict[str, Any], problem: str) -> None:
    with pytest.raises(RunError, match=problem):
        derived_metrics(objective_that_derives(derived), {"loss": 2.0, "hits": 1.0})


def test_derived_metrics__declared_number__is_added() -> None:
    found = derived_metrics(objective_that_derives({"rate": 1}), {"loss": 2.0})
    assert found == {"loss": 2.0, "rate": 1.0}


def test_as_record__extra_with_a_built_in_key__does_not_replace_it() -> None:
    record = replace(metrics(2, loss=3.0), extra={"train/loss": 0.0, "step": 9.0, "eval/hits": 1.0}).as_record()
    assert (record["train/loss"], record["step"], record["eval/hits"]) == (3.0, 2, 1.0)


@pytest.mark.parametrize("weight", [math.nan, math.inf, 5.0])
def test_check_weight__not_the_weight_of_the_step__is_refused(weight: float) -> None:
    engine: Any = SimpleNamespace(_module=SimpleNamespace(objective=object()))
    with pytest.raises(RunError, match="counts a weight of"):
        Engine._check_weight(engine, weight, total_weight=4.0, step=1)
    Engine._check_weight(engine, 4.0, total_weight=4.0, step=1)
