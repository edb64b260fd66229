"""training.early_stopping: the rule, and that the step of the stop does not depend on the machines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from forge.checkpoint.manifest import ModelShape, Progress, state_bytes, state_from_bytes
from forge.checkpoint.reader import list_checkpoints
from forge.checkpoint.storage import open_storage
from forge.config.training import EarlyStoppingSpec
from forge.errors import RunError
from forge.events import EarlyStopped, Evaluated
from forge.objective.registry import Direction
from forge.plan.inputs import CorpusInfo
from forge.train.early_stopping import EarlyStopping
from tests.support.jobs import tiny_job, tiny_plan
from tests.support.ranks import Recording, run_ranks

START = Progress(step=0, num_tokens=0, config_digest="job", corpus="corpus")
SHAPE = ModelShape(parameters={}, tied={}, config={})


def evaluated(step: int, value: float, *, weights: str = "current") -> Evaluated:
    return Evaluated(step=step, loss=value, metrics={"hits": value}, num_tokens=1, weights=weights, seconds=0.1)


def last_evaluation(stopping: EarlyStopping, values: Sequence[float]) -> int | None:
    """The evaluation, from 1, after which a run stops; its state goes through a checkpoint each time. The other
    weights, averaged or not, get worse all the time."""
    spec, progress = stopping.spec, START
    assert spec is not None
    weights = ("ema", "current") if "ema_" in spec.metric else ("current", "ema")
    for step, value in enumerate(values, start=1):
        progress = stopping.observe(evaluated(step, value, weights=weights[0]), progress=progress)
        other = evaluated(step, 100.0 + step, weights=weights[1])
        assert stopping.observe(other, progress=progress) == progress
        progress = state_from_bytes(state_bytes(progress, SHAPE))[0]
        if stopping.is_over(progress):
            return step
    return None


@pytest.mark.parametrize(
    ("metric", "direction", "min_delta", "values", "expected"),
    [
        ("eval/loss", "min", 0.0, [3.0, 2.0, 2.5, 1.9, 1.9, 2.0], 6),
        ("eval/loss", "min", 0.0, [3.0, 2.0, 1.0, 0.5], None),
        ("eval/ema_loss", "min", 0.0, [3.0, 2.0, 2.5, 1.9, 1.9, 2.0], 6),
        ("eval/ema_hits", "max", 0.0, [1.0, 2.0, 2.0, 1.0, 3.0], 4),
        ("eval/loss", "min", 0.2, [3.0, 2.9, 2.85, 2.0], 3),
        ("eval/hits", "max", 0.0, [1.0, 2.0, 2.0, 1.0, 3.0], 4),
        ("eval/hits", "min", 0.0, [3.0, 4.0, 5.0], 3),
        ("eval/loss", "min", 0.0, [math.nan, 2.0, math.nan, -math.inf], 4),
        ("eval/loss", "min", 0.0, [math.nan, math.nan], 2),
    ],
)
def test_early_stopping__no_improvement_in_the_direction__stops_after_patience(
    metric: str, direction: Direction, min_delta: float, values: list[float], expected: int | None
) -> None:
    spec = EarlyStoppingSpec(metric=metric, patience=2, min_delta=min_delta)
    assert last_evaluation(EarlyStopping(spec=spec, directions={"hits": direction}), values) == expected


def test_early_stopping__metric_that_is_not_reported__names_those_that_are() -> None:
    stopping = EarlyStopping(spec=EarlyStoppingSpec(metric="eval/rank"), directions={"rank": "max"})
    with pytest.raises(RunError, match=r"step 4 has no eval/rank; the objective reported loss, hits"):
        stopping.observe(evaluated(4, 1.0), progress=START)


def test_early_stopping__metric_of_the_averaged_weights__must_be_measured_each_time() -> None:
    stopping = {"training__early_stopping": {"metric": "eval/ema_loss"}}
    always = {"training__ema": {"decay": 0.9, "evaluate": "always"}}
    assert tiny_job(**stopping, **always).training.early_stopping is not None
    for averaged in ({}, {"training__ema": {"decay": 0.9}}):
        with pytest.raises(ValueError, match=r"early_stopping\.metric: is not a metric"):
            tiny_job(**stopping, **averaged)


def test_progress__state_without_early_stopping__is_read() -> None:
    body = json.loads(state_bytes(START, SHAPE))
    for key in ("best_value", "best_step", "num_evaluations_since_best"):
        del body[key]
    assert state_from_bytes(json.dumps(body).encode())[0] == START


def stops_of(recording: Recording) -> list[EarlyStopped]:
    return [event for event in recording.events if isinstance(event, EarlyStopped)]


@pytest.mark.parametrize("metric", ["eval/loss", pytest.param("eval/ema_loss", marks=pytest.mark.slow)])
def test_early_stopping__resumed_at_another_world_size__stops_at_the_step_of_an_uninterrupted_run(
    corpus: CorpusInfo, tmp_path: Path, metric: str
) -> None:
    plan = tiny_plan(
        corpus,
        training__total_steps=12,
        training__evaluate_every="2 steps",
        training__early_stopping={"metric": metric, "patience": 2, "min_delta": 100},
        training__ema={"decay": 0.5, "evaluate": "always"} if "ema" in metric else None,
    )
    whole = run_ranks(plan, tmp_path / "whole", world_size=2)
    assert [metrics.step for metrics in whole.steps] == list(range(1, 7))
    assert [(stop.step, stop.metric, stop.best_step) for stop in stops_of(whole)] == [(6, metric, 2)]
    assert list_checkpoints(open_storage(str(tmp_path / "whole")))[0] == "step-00000006"

    first = run_ranks(plan, tmp_path / "parts", world_size=2, stop_after=5)
    assert (first.steps[-1].step, stops_of(first)) == (5, [])
    rest = run_ranks(plan, tmp_path / "parts", world_size=3)
    assert [metrics.step for metrics in rest.steps] == [6]
    assert stops_of(rest)[0].best == pytest.approx(stops_of(whole)[0].best, rel=1e-2)

    again = run_ranks(plan, tmp_path / "parts", world_size=1)
    assert (again.steps, stops_of(again)) == ([], stops_of(rest))
