"""Another length of a run that is resumed: which steps follow which, and what is refused."""

from __future__ import annotations

import json
import math

import pytest

from forge.config.dump import dump_job
from forge.config.load import load_job
from forge.errors import PlanError
from forge.plan.curve import curve_differences, run_digest, with_length_of
from forge.plan.lengths import continue_plan, is_same_length
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.train.lr_schedule import length_change
from tests.support.jobs import tiny_job, tiny_plan


def resumed(before: Plan, *, last_step: int, **changes: object) -> Plan:
    return continue_plan(tiny_plan(**changes), before=before, last_step=last_step)


def test_continue_plan__longer__keeps_digest_and_former_schedule_up_to_the_last_step() -> None:
    first = tiny_plan(training__total_steps=6)
    longer = resumed(first, last_step=4, training__total_steps=12)
    assert (longer.total_steps, longer.schedule_steps.total) == (12, 12)
    assert [(one.given, one.schedule.total, one.until_step) for one in longer.former_lengths] == [
        ("total_steps: 6", 6, 4)
    ]
    assert run_digest(longer) == run_digest(first)
    assert plan_from_json(plan_to_json(longer)) == longer


def test_continue_plan__lengthened_twice_and_resumed__has_every_length() -> None:
    first = tiny_plan(training__total_steps=6)
    second = resumed(first, last_step=6, training__total_steps=12)
    third = resumed(second, last_step=9, training__total_steps=20)
    again = resumed(third, last_step=11, training__total_steps=20)
    assert [(one.schedule.total, one.until_step) for one in again.former_lengths] == [(6, 6), (12, 9)]
    assert run_digest(again) == run_digest(first)


def test_continue_plan__length_that_no_step_had__leaves_no_trace() -> None:
    first = tiny_plan(training__total_steps=6)
    second = resumed(first, last_step=6, training__total_steps=99)
    third = resumed(second, last_step=6, training__total_steps=20)
    assert [(one.schedule.total, one.until_step) for one in third.former_lengths] == [(6, 6)]


def test_continue_plan__warm_up_is_a_share_and_has_ended__does_not_begin_again() -> None:
    first = tiny_plan(training__total_steps=10, training__schedule={"warmup": "20%"})
    longer = resumed(first, last_step=5, training__total_steps=1000, training__schedule={"warmup": "20%"})
    assert longer.schedule_steps.warmup == 2


def test_continue_plan__shorter_than_reached__is_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError, match=r"total_steps: 4 is 4 steps, but the run has already reached step 5"):
        resumed(tiny_plan(training__total_steps=6), last_step=5, training__total_steps=4)


def test_continue_plan__stopped_early__is_refused() -> None:
    with pytest.raises(PlanError, match=r"early_stopping has ended the run at step 5"):
        continue_plan(tiny_plan(training__total_steps=12), before=tiny_plan(), last_step=5, is_stopped_early=True)


def test_length_change__cosine_has_ended__says_that_the_rate_rises_again() -> None:
    schedule = {"kind": "cosine", "warmup": 2, "final_fraction": 0.1}
    first = tiny_plan(training__total_steps=6, training__schedule=schedule)
    longer = resumed(first, last_step=6, training__total_steps=12, training__schedule=schedule)
    change = length_change(longer)
    assert (change.from_step, change.total_steps_before, change.total_steps) == (7, 6, 12)
    assert change.learning_rate_before == pytest.approx(0.1 * 1e-2)
    expected = 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 5 / 10)) / 2)
    assert change.learning_rate == pytest.approx(expected)


def test_curve_differences__length_alone__are_none_but_for_a_search() -> None:
    assert curve_differences(tiny_job(), tiny_job(training__total_steps=9)) == []
    space = {"search": {"max_trials": 2, "metric": "train/loss", "space": {"data.seed": {"choice": [1, 2]}}}}
    found = curve_differences(tiny_job(**space), tiny_job(**space, training__total_steps=9))
    assert [difference.key for difference in found] == ["training.total_steps"]


def test_with_length_of__tokens_instead_of_steps__is_a_job_file_of_these_keys(tmp_path) -> None:
    tokens = tiny_job(training__total_steps=None, training__total_tokens=4096)
    changed = with_length_of(tiny_job(), tokens)
    assert not is_same_length(changed, tiny_job())
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(changed))
    assert is_same_length(load_job(path).job, tokens)
    assert "total_steps" not in json.dumps(path.read_text())
