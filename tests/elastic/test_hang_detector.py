"""Which rank hangs, and how long ranks may be silent."""

from __future__ import annotations

import math

import pytest

from forge.elastic.hang_detector import HangDetector, StalledRank, StepTimes
from forge.elastic.states import Phase


def test_find_stalled_rank__all_silent__names_the_one_that_is_silent_longest_once() -> None:
    detector = HangDetector()
    detector.update(0, silent_s=6.0, is_suspended=False, now=100.0)
    detector.update(1, silent_s=8.0, is_suspended=False, now=100.0)
    assert detector.find_stalled_rank(limit_s=6.0, now=100.0) is None
    found = detector.find_stalled_rank(limit_s=5.0, now=100.0)
    assert found == StalledRank(rank=1, seconds=8.0, is_suspended=False)
    assert detector.find_stalled_rank(limit_s=5.0, now=101.0) is None


def test_find_stalled_rank__one_is_stopped_by_a_signal__names_it() -> None:
    detector = HangDetector()
    detector.update(0, silent_s=9.0, is_suspended=False, now=100.0)
    detector.update(1, silent_s=6.0, is_suspended=True, now=100.0)
    found = detector.find_stalled_rank(limit_s=5.0, now=100.0)
    assert found == StalledRank(rank=1, seconds=6.0, is_suspended=True)


@pytest.mark.parametrize(("step_s", "limit_s"), [(0.1, 5.0), (10.0, 40.0)])
def test_stall_limit__training__is_four_long_steps_and_at_least_five_seconds(step_s: float, limit_s: float) -> None:
    steps = StepTimes()
    for step in range(1, 101):
        steps.add(step, seconds=step_s, num_workers=1)
    assert steps.stall_limit_s(Phase.TRAINING, is_first=False) == pytest.approx(limit_s)
    assert steps.stall_limit_s(Phase.STOPPING, is_first=False) == math.inf


def test_stall_limit__hangs_in_a_row__doubles_up_to_sixteen_times_until_steps_were_taken() -> None:
    steps, slow = StepTimes(), StalledRank(rank=0, seconds=20.1, is_suspended=False)
    limits = []
    for _ in range(6):
        limits.append(steps.stall_limit_s(Phase.STARTING, is_first=False))
        steps.note_hang(slow)
    assert limits == [20, 40, 80, 160, 300, 300]
    assert steps.stall_limit_s(Phase.STARTING, is_first=True) == 300
    assert steps.stall_limit_s(Phase.TRAINING, is_first=False) == 16 * 5
    for step in range(1, 200):
        steps.add(step, seconds=0.1, num_workers=1)
    assert steps.stall_limit_s(Phase.TRAINING, is_first=False) == 16 * 5
    steps.add(200, seconds=0.1, num_workers=1)
    assert steps.stall_limit_s(Phase.TRAINING, is_first=False) == 5


def test_stall_limit__rank_that_a_signal_stopped__stays_as_it_was() -> None:
    steps = StepTimes()
    steps.note_hang(StalledRank(rank=0, seconds=6.0, is_suspended=True))
    assert steps.stall_limit_s(Phase.TRAINING, is_first=False) == 5
