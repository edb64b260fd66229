"""Deadline policies: cases worked out by hand, and properties on random availability."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from forge.chaos.deadline_simulation import (
    DeadlineJob,
    RegionAvailability,
    availability_of,
    least_usd,
    random_availability,
    simulate_deadline,
)
from forge.chaos.trace import TraceBuilder
from forge.errors import ArgumentError
from forge.plan.deadline import DEADLINE_POLICIES

HOUR = 3600.0
JOB = DeadlineJob(
    work_s=2 * HOUR, deadline_s=3 * HOUR, num_nodes=2, start_s=60, on_demand_usd_per_hour=10, interval_s=60
)


def region(*spans: tuple[int, int], usd: float = 4.0) -> RegionAvailability:
    """Availability from (minutes, machines)."""
    return RegionAvailability(counts=[count for minutes, count in spans for _ in range(minutes)], usd_per_hour=usd)


def test_spot_always__all_but_on_demand_use_it_alone() -> None:
    costs = {p: simulate_deadline(p, JOB, regions=[region((400, 2))]) for p in DEADLINE_POLICIES}
    paid_h = 2 * (2 + 1 / 60)  # two machines, their start included
    assert costs["on-demand"].usd == pytest.approx(paid_h * 10)
    for policy in ("greedy", "uniform-progress", "elastic"):
        assert costs[policy].usd == pytest.approx(paid_h * 4)
        assert costs[policy].finished_at_s == pytest.approx(2 * HOUR + 60)


def test_no_spot__every_policy_meets_the_deadline_on_demand() -> None:
    for policy in DEADLINE_POLICIES:
        found = simulate_deadline(policy, JOB, regions=[region((400, 0))])
        assert found.is_met
        assert found.usd == pytest.approx(10 * found.on_demand_node_hours)
        assert found.spot_node_hours == 0


def test_elastic__half_of_the_machines__works_with_them() -> None:
    """One of two machines for 3 h does 1.5 h of the work, on-demand time the rest. Rigid policies cannot use it."""
    elastic = simulate_deadline("elastic", JOB, regions=[region((400, 1))])
    assert elastic.is_met
    assert elastic.spot_node_hours == pytest.approx(3, abs=0.2)
    assert elastic.on_demand_node_hours == pytest.approx(1, abs=0.3)
    assert simulate_deadline("uniform-progress", JOB, regions=[region((400, 1))]).spot_node_hours == 0


def test_elastic__spot_returns_after_the_slack_is_used_up__is_used_again() -> None:
    away = region((70, 0), (400, 2))
    elastic = simulate_deadline("elastic", JOB, regions=[away])
    greedy = simulate_deadline("greedy", JOB, regions=[away])
    assert elastic.is_met
    assert elastic.usd < 0.7 * greedy.usd


def test_several_regions__moves_to_where_machines_are() -> None:
    regions = [region((40, 2), (400, 0)), region((400, 2), usd=5.0)]
    found = simulate_deadline("elastic", JOB, regions=regions)
    assert found.on_demand_node_hours == 0
    assert found.num_losses == 2


def test_several_regions__move_with_a_pause_and_a_price__is_paid_and_waited_for() -> None:
    regions = [region((40, 2), (400, 0)), replace(region((400, 2), usd=5.0), move_usd=1.5)]
    found = simulate_deadline("elastic", replace(JOB, move_s=600), regions=regions)
    assert (found.num_moves, found.on_demand_node_hours) == (1, 0)
    paid_h = (40 * 4 + (2 * 60 + 1 - 40 + 1) * 5) / 60  # a start in each region
    assert found.usd == pytest.approx(2 * paid_h + 1.5)
    assert found.finished_at_s == pytest.approx(2 * HOUR + 120 + 600)


def test_several_regions__move_dearer_than_on_demand__stays() -> None:
    regions = [region((40, 2), (400, 0)), replace(region((400, 2), usd=5.0), move_usd=50.0)]
    found = simulate_deadline("elastic", JOB, regions=regions)
    assert found.num_moves == 0 and found.on_demand_node_hours > 0 and found.is_met


@pytest.mark.parametrize("seed", range(12))
def test_several_regions__random_availability_and_long_pauses__no_deadline_missed(seed: int) -> None:
    dice = random.Random(seed)
    job = DeadlineJob(
        work_s=12 * HOUR,
        deadline_s=12 * HOUR * dice.uniform(1.1, 2.0),
        num_nodes=4,
        start_s=dice.choice([180.0, 600.0]),
        on_demand_usd_per_hour=10,
        move_s=900,
    )
    regions = [
        RegionAvailability(
            counts=random_availability(
                num_nodes=4, share=0.5, mean_outage_s=7200, num_intervals=1500, interval_s=60, seed=10 * seed + k
            ),
            usd_per_hour=3.5 + 0.3 * k,
            move_usd=0.5,
        )
        for k in range(3)
    ]
    found = simulate_deadline("elastic", job, regions=regions)
    assert found.is_met
    assert found.usd >= least_usd(job, regions=regions)


def test_least__one_hour_of_spot__the_rest_on_demand() -> None:
    assert least_usd(JOB, regions=[region((60, 2), (400, 0))]) == pytest.approx(2 * 4 + 2 * 10)
    assert least_usd(JOB, regions=[region((60, 2), (400, 0)), region((400, 1), usd=6)]) == pytest.approx(
        2 * 4 + 2 * 6  # of the second region one machine for the two hours in which the first has none
    )


def test_availability__of_a_trace__counts_at_each_interval() -> None:
    builder = TraceBuilder()
    builder.add(at_s=0, added=("a", "b"))
    builder.add(at_s=90, removed=("a",))
    builder.add(at_s=240)
    assert availability_of(builder.build(), interval_s=60) == [2, 2, 1, 1]


@pytest.mark.parametrize("is_each", [False, True])
def test_random_availability__no_deadline_missed_and_never_below_the_bound(is_each: bool) -> None:
    dice, ratios = random.Random(1), []
    for seed in range(40):
        share, slack = dice.uniform(0.2, 0.9), dice.uniform(1.1, 2.0)
        job = DeadlineJob(
            work_s=12 * HOUR,
            deadline_s=12 * HOUR * slack,
            num_nodes=4,
            start_s=dice.choice([60.0, 300.0, 600.0]),
            on_demand_usd_per_hour=10,
        )

        def counts(num_nodes: int, number: int, share: float = share) -> list[int]:
            return random_availability(
                num_nodes=num_nodes, share=share, mean_outage_s=2400, num_intervals=1500, interval_s=60, seed=number
            )

        if is_each:
            available = [sum(each) for each in zip(*(counts(1, 10 * seed + n) for n in range(4)), strict=True)]
        else:
            available = counts(4, seed)
        regions = [RegionAvailability(counts=available, usd_per_hour=3.5)]
        elastic = simulate_deadline("elastic", job, regions=regions)
        uniform = simulate_deadline("uniform-progress", job, regions=regions)
        assert elastic.is_met
        assert uniform.is_met
        assert elastic.usd >= least_usd(job, regions=regions)
        ratios.append(elastic.usd / uniform.usd)
    assert statistics.fmean(ratios) < (0.84 if is_each else 0.96)


def test_impossible_deadline__says_what_is_possible() -> None:
    with pytest.raises(ArgumentError, match=r"takes 2\.07 h .* a deadline of 2\.00 h cannot be met"):
        DeadlineJob(work_s=2 * HOUR, deadline_s=2 * HOUR, num_nodes=2, start_s=60, on_demand_usd_per_hour=10)
