"""Interruptions in closed form: hand-checked cases, and the rates of bands and traces."""

from __future__ import annotations

import math

import pytest

from forge.plan.interruptions import interruptions_of, rate_of_band
from forge.plan.recovery import ChangeCosts, interrupted_run, training_capacity
from forge.pricing.offer import InterruptionBand
from tests.support.offers import offer

PAUSE = ChangeCosts(pause_s=0.6)


def test_interrupted_run__no_losses__takes_as_long_as_before() -> None:
    run = interrupted_run(10.0, num_machines=4, min_machines=1, losses_per_hour=0.0, start_s=200.0, costs=PAUSE)
    assert (run.hours, run.num_interruptions, run.pausing_hours, run.waiting_hours) == (10.0, 0.0, 0.0, 0.0)


def test_interrupted_run__four_machines__adds_up_by_hand() -> None:
    # A machine lives 10 h on average and starts for 0.05 h: it trains for e^-0.005 = 0.995012 of its time.
    run = interrupted_run(10.0, num_machines=4, min_machines=1, losses_per_hour=0.1, start_s=180.0, costs=PAUSE)
    # 0.398005 losses of training machines an hour, 0.6 s each: 6.6334e-5 of the time.
    assert run.hours == pytest.approx(10.0 / (0.995012479 * (1 - 6.6332e-5)), rel=1e-7)
    assert run.num_interruptions == pytest.approx(0.1 * 4 * run.hours)
    assert run.pausing_hours == pytest.approx(6.6332e-5 * run.hours, rel=1e-4)
    assert run.waiting_hours == pytest.approx((1 - 0.995012479) * run.hours, rel=1e-3)
    assert run.repeated_hours == 0.0
    assert run.hours == pytest.approx(10.0 + run.pausing_hours + run.waiting_hours)


def test_interrupted_run__one_machine__is_dalys_formula() -> None:
    # Daly 2006: (e^(λ·600 s) - 1) · e^(λ·120 s) ÷ λ for each 600 s of work.
    costs = ChangeCosts(pause_s=120.0, saved_every_s=600.0, restarts_per_loss=1.0)
    run = interrupted_run(5.0, num_machines=1, min_machines=1, losses_per_hour=1.0, start_s=0.0, costs=costs)
    assert run.hours == pytest.approx(5.0 * 6 * math.expm1(1 / 6) * math.exp(1 / 30))
    assert run.hours == pytest.approx(5.0 + run.pausing_hours + run.repeated_hours)
    assert run.num_restarts == run.num_interruptions == pytest.approx(run.hours)


def test_interrupted_run__half_of_the_machines_to_be_had__takes_twice_as_long() -> None:
    run = interrupted_run(
        10.0, num_machines=8, min_machines=1, losses_per_hour=0.0, start_s=60.0, costs=PAUSE, available=0.5
    )
    assert (run.hours, run.waiting_hours) == (20.0, 10.0)


def test_interrupted_run__all_of_2048_machines_needed__never_ends() -> None:
    """All are there for e^(-0.61 h⁻¹ · 600 s · 2048) of the time: 10^-90 of it."""
    run = interrupted_run(
        1.0, num_machines=2048, min_machines=2048, losses_per_hour=0.61, start_s=600.0, costs=PAUSE
    )
    assert run.hours == math.inf


def test_interrupted_run__losses_faster_than_starts__never_ends() -> None:
    run = interrupted_run(1.0, num_machines=9, min_machines=9, losses_per_hour=1e4, start_s=600.0, costs=PAUSE)
    assert run.hours == math.inf


@pytest.mark.parametrize(
    ("share", "num", "least", "expected"),
    [
        (0.9, 4, 1, 0.9),
        (0.9, 2, 2, 0.81),
        (0.9, 3, 2, (2 * 3 * 0.81 * 0.1 + 3 * 0.729) / 3),
        (0.9, 3, 3, 0.729),
        (1.0, 64, 64, 1.0),
        (0.0, 4, 2, 0.0),
        (0.999, 2048, 2, 0.999),
    ],
)
def test_training_capacity__by_hand(share: float, num: int, least: int, expected: float) -> None:
    assert training_capacity(share, num_machines=num, min_machines=least) == pytest.approx(expected)


def test_rate_of_band__five_to_ten_percent_a_month__is_the_rate_of_its_bounds_and_middle() -> None:
    rate = rate_of_band(InterruptionBand(low=0.05, high=0.10))
    for value, share in ((rate.low, 0.05), (rate.likely, 0.075), (rate.high, 0.10)):
        assert 1 - math.exp(-value * 730.5) == pytest.approx(share)


def test_rate_of_band__above_twenty_percent__is_limited_by_what_was_observed() -> None:
    rate = rate_of_band(InterruptionBand(low=0.2, high=1.0))
    assert rate.low == pytest.approx(-math.log(0.8) / 730.5)
    assert rate.likely == pytest.approx(-math.log(0.4) / 730.5)
    assert rate.high == 0.61


def test_interruptions_of__no_band__are_assumed_and_never_zero() -> None:
    found = interruptions_of(offer(interruption=None))
    assert found.per_machine_hour.likely == pytest.approx(-math.log(0.9) / 24)
    assert 0 < found.per_machine_hour.low < found.per_machine_hour.likely < found.per_machine_hour.high
    assert "assumed" in found.basis
