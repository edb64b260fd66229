"""The best choices for a deadline: cases worked out by hand, and between a bound and a policy."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.deadline_optimum import OnOffSpot, find_optimum
from forge.chaos.deadline_simulation import (
    DeadlineJob,
    RegionAvailability,
    least_usd,
    random_availability,
    simulate_deadline,
)

HOUR = 3600.0
ALWAYS, NEVER = [1] * 500, [0] * 500


def spot_of(*prices: float, there_h: float = 1.0, outage_h: float = 1.0) -> OnOffSpot:
    return OnOffSpot(
        usd_per_hour=prices,
        on_demand_usd_per_hour=10.0,
        mean_there_s=there_h * HOUR,
        mean_outage_s=outage_h * HOUR,
        start_s=0.1 * HOUR,
    )


def test_optimum__hand_worked__pays_the_start_and_the_work_once() -> None:
    """Two hours of work, a start of a tenth of an hour."""
    always = find_optimum(spot_of(4.0, there_h=1e9), work_s=2 * HOUR, deadline_s=4 * HOUR)
    assert always.usd([ALWAYS]) == pytest.approx(2.1 * 4)
    never = find_optimum(spot_of(4.0, outage_h=1e9), work_s=2 * HOUR, deadline_s=4 * HOUR)
    assert never.usd([NEVER]) == pytest.approx(2.1 * 10)
    two = find_optimum(spot_of(5.0, 4.0, there_h=1e9), work_s=2 * HOUR, deadline_s=4 * HOUR)
    assert two.usd([ALWAYS, ALWAYS]) == pytest.approx(2.1 * 4)
    assert two.usd([ALWAYS, NEVER]) == pytest.approx(2.1 * 5)


def test_optimum__no_slack__is_on_demand_from_the_first_interval() -> None:
    tight = find_optimum(spot_of(6.0), work_s=2 * HOUR, deadline_s=2.1 * HOUR)
    assert tight.usd([ALWAYS]) == pytest.approx(2.1 * 10)


def test_optimum__random_availability__between_the_bound_and_the_policy() -> None:
    found, policy = [], []
    optimum = find_optimum(spot_of(3.5, there_h=2.0, outage_h=1.0), work_s=12 * HOUR, deadline_s=16 * HOUR)
    job = DeadlineJob(
        work_s=12 * HOUR,
        deadline_s=16 * HOUR,
        num_nodes=1,
        start_s=0.1 * HOUR,
        on_demand_usd_per_hour=10,
        interval_s=0.1 * HOUR,
    )
    for seed in range(60):
        counts = random_availability(
            num_nodes=1, share=2 / 3, mean_outage_s=HOUR, num_intervals=200, interval_s=0.1 * HOUR, seed=seed
        )
        regions = [RegionAvailability(counts=counts, usd_per_hour=3.5)]
        found.append(optimum.usd([counts]))
        policy.append(simulate_deadline("elastic", job, regions=regions).usd)
        assert found[-1] >= least_usd(job, regions=regions) - 1e-6
    assert statistics.fmean(found) < statistics.fmean(policy)
