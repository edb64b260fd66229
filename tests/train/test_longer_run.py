"""A run that is resumed with another length: one curve, each step under the length that it had when it was made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from forge.plan.inputs import CorpusInfo
from forge.plan.lengths import continue_plan
from forge.train.lr_schedule import learning_rate
from tests.support.jobs import tiny_plan
from tests.support.ranks import run_ranks


def test_longer_run__resumed_at_other_world_sizes__has_one_curve_with_both_schedules(
    corpus: CorpusInfo, tmp_path: Path
) -> None:
    short = tiny_plan(corpus, training__total_steps=4)
    longer = continue_plan(tiny_plan(corpus, training__total_steps=9), before=short, last_step=4)
    first = run_ranks(short, tmp_path / "run", world_size=2)
    middle = run_ranks(longer, tmp_path / "run", world_size=3, stop_after=6)
    last = run_ranks(longer, tmp_path / "run", world_size=1)
    steps = [*first.steps, *middle.steps, *last.steps]
    assert [metrics.step for metrics in steps] == list(range(1, 10))
    peak, schedule = 1e-2, short.job.training.schedule
    assert [metrics.learning_rate for metrics in steps] == [
        learning_rate(schedule, step=step, lengths=(short if step <= 4 else longer).schedule_steps, peak=peak)
        for step in range(1, 10)
    ]
    samples = {**first.sample_ids, **middle.sample_ids, **last.sample_ids}
    whole = run_ranks(tiny_plan(corpus, training__total_steps=9), tmp_path / "whole", world_size=1)
    assert {step: sorted(ids) for step, ids in samples.items()} == {
        step: sorted(ids) for step, ids in whole.sample_ids.items()
    }


def test_longer_run__steps_before_the_change_are_repeated__have_equal_losses(
    corpus: CorpusInfo, tmp_path: Path
) -> None:
    short = tiny_plan(corpus, training__total_steps=6, checkpoint={"every": "2 steps", "keep": 9})
    first = run_ranks(short, tmp_path, world_size=2, stop_after=5)
    longer = continue_plan(tiny_plan(corpus, training__total_steps=12), before=short, last_step=5)
    for folder in tmp_path.glob("step-*"):  # step 4 may still have been written when step 5 was saved
        if folder.name > "step-00000002":
            shutil.rmtree(folder)
    again = run_ranks(longer, tmp_path, world_size=2, stop_after=6)
    assert [metrics.step for metrics in again.steps] == [3, 4, 5, 6]
    repeated = again.steps[:3]
    assert [metrics.learning_rate for metrics in repeated] == [m.learning_rate for m in first.steps[2:5]]
    assert [metrics.loss for metrics in repeated] == pytest.approx([m.loss for m in first.steps[2:5]], rel=1e-6)
