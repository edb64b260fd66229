"""Adaptive snapshot interval: at most 1 % of the time, and stable under noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.train.snapshot_interval import SnapshotInterval


def train(
    interval: SnapshotInterval,
    *,
    num_snapshots: int,
    step_s: float,
    cost_s: Callable[[int], float],
    first_step: int = 1,
) -> tuple[list[int], list[int]]:
    """Steps whose n-th snapshot costs `cost_s(n)`. Returns: the steps of snapshots, and each new interval."""
    taken: list[int] = []
    intervals: list[int] = []
    for step in itertools.count(first_step):
        cost = 0.0
        if interval.is_due(step):
            interval.record_snapshot(step)
            cost = cost_s(len(taken))
            taken.append(step)
        if interval.update(step_s=step_s, cost_s=cost):
            intervals.append(interval.every)
        if len(taken) == num_snapshots:
            return taken, intervals
    raise AssertionError


def test_auto__cost_below_one_percent__every_step() -> None:
    taken, intervals = train(SnapshotInterval(fixed=None), num_snapshots=50, step_s=1.0, cost_s=lambda _: 0.0099)
    assert (taken, intervals) == (list(range(1, 51)), [])


@pytest.mark.parametrize(("cost_s", "every"), [(0.02, 2), (0.021, 3), (0.1, 10), (2.5, 250)])
def test_auto__higher_cost__interval_keeps_one_percent(cost_s: float, every: int) -> None:
    taken, intervals = train(SnapshotInterval(fixed=None), num_snapshots=20, step_s=1.0, cost_s=lambda _: cost_s)
    assert intervals == [every]
    assert {b - a for a, b in itertools.pairwise(taken[8:])} == {every}


@given(step_s=st.floats(1e-3, 60), cost_s=st.floats(1e-6, 600))
def test_auto__constant_cost__settles_once_at_one_percent(step_s: float, cost_s: float) -> None:
    interval = SnapshotInterval(fixed=None)
    _, intervals = train(interval, num_snapshots=12, step_s=step_s, cost_s=lambda _: cost_s)
    assert len(intervals) <= 1
    assert interval.share <= 0.01 * (1 + 1e-9) or interval.every == 1000
    assert interval.every == 1 or cost_s > 0.01 * (interval.every - 1) * step_s * (
        1 - 1e-9
    )  # not longer than necessary


def test_auto__noise__changes_once() -> None:
    interval = SnapshotInterval(fixed=None)
    _, intervals = train(interval, num_snapshots=200, step_s=1.0, cost_s=lambda n: 0.10 * (1.4 if n % 3 else 0.7))
    assert len(intervals) == 1


@given(st.lists(st.floats(0.001, 1.0), min_size=20, max_size=60))
def test_auto__recent_costs__share_at_most_one_percent(costs_s: list[float]) -> None:
    interval = SnapshotInterval(fixed=None)
    for cost_s in costs_s:
        interval.update(step_s=1.0, cost_s=cost_s)
    assert interval.share <= 0.01 * (1 + 1e-9)


def test_auto__single_outlier__is_ignored() -> None:
    _, intervals = train(
        SnapshotInterval(fixed=None), num_snapshots=50, step_s=1.0, cost_s=lambda n: 30.0 if n == 20 else 0.005
    )
    assert intervals == []


def test_auto__cost_drops__interval_shrinks() -> None:
    interval = SnapshotInterval(fixed=None)
    taken, _ = train(interval, num_snapshots=20, step_s=1.0, cost_s=lambda _: 0.5)
    assert interval.every == 50
    train(interval, num_snapshots=20, step_s=1.0, cost_s=lambda _: 0.001, first_step=taken[-1] + 1)
    assert interval.every == 1


def test_auto__too_few_measurements__keeps_every_step() -> None:
    interval = SnapshotInterval(fixed=None)
    _, intervals = train(interval, num_snapshots=7, step_s=1.0, cost_s=lambda _: 5.0)
    assert (interval.every, intervals) == (1, [])


@pytest.mark.parametrize("every", [1, 3])
def test_fixed__any_cost__is_kept(every: int) -> None:
    taken, intervals = train(SnapshotInterval(fixed=every), num_snapshots=20, step_s=1.0, cost_s=lambda _: 10.0)
    assert (taken, intervals) == ([every * n for n in range(1, 21)], [])


def test_fixed__early_snapshot__delays_the_next() -> None:
    interval = SnapshotInterval(fixed=4)
    interval.record_snapshot(3)  # for a checkpoint
    assert [step for step in range(4, 9) if interval.is_due(step)] == [7, 8]
