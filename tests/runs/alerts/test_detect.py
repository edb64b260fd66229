"""Which records are worth an alert."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from forge.events import (
    CostUpdated,
    DeadlineForecast,
    Event,
    GenerationStarting,
    MembershipChangeStarted,
    RankHung,
    RunFailed,
    RunFinished,
    RunStarted,
    RunStopped,
    WaitingForMachines,
    event_to_record,
)
from forge.runs.alerts.detect import Alert, AlertDetector
from forge.runs.alerts.loss_spike import LossSpikes
from tests.support.runs import metrics
from tests.support.seeds import SEED

_STARTED = RunStarted(run_id="r", total_steps=1000, resumed_from_step=0)


def alerts_of(*events: Event, max_usd: float | None = None, noun: str = "run") -> list[Alert]:
    limit = None if max_usd is None else ("resources.max_usd" if noun == "run" else "search.max_usd", max_usd)
    detector = AlertDetector(usd_limit=limit, now_s=0.0, noun=noun)
    return [
        alert
        for number, event in enumerate(events)
        for alert in detector.event({"time": float(number)} | event_to_record(event), now_s=float(number))
    ]


def row(step: int, loss: float) -> dict[str, Any]:
    return metrics(step, loss=loss).as_record() | {"time": float(step)}


def spikes(losses: list[float]) -> list[int]:
    found = LossSpikes()
    return [step for step, loss in enumerate(losses, start=1) if found.add(loss) is not None]


def noisy(random: random.Random, *, steps: int, noise: float) -> list[float]:
    """A falling loss with noise in proportion to it, and two bad batches every 200 steps."""
    curve = [2 + 8 * math.exp(-step / 300) for step in range(steps)]
    odd = [1.8 if step % 200 < 2 else 1.0 for step in range(steps)]
    return [value * bad * (1 + random.gauss(0, noise)) for value, bad in zip(curve, odd, strict=True)]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.2])
def test_loss_spikes__of_noise_and_bad_batches__are_none(noise: float) -> None:
    draws = random.Random(SEED)
    assert not spikes(noisy(draws, steps=5000, noise=noise))
    assert not spikes([draws.gauss(0, 0.001) for _ in range(2000)])  # around zero
    assert not spikes([1.0] * 500)


def test_loss_spike__of_several_steps__is_one_until_the_loss_is_back() -> None:
    draws = random.Random(SEED)
    losses = [2 + draws.gauss(0, 0.05) for _ in range(600)]
    for start in (300, 450):
        losses[start : start + 20] = [6.0] * 20
    assert spikes(losses) == [303, 453]
    assert spikes([2.0] * 200 + [6.0] * 800) == [203]  # a loss that stays high becomes the usual one
    assert spikes([2.0] * 10 + [9.0] * 5 + [2.0] * 100) == []  # too early to know


def test_step__without_a_finite_loss__is_one_alert_until_it_is_finite() -> None:
    detector = AlertDetector(usd_limit=None, now_s=0.0)
    losses = [1.0, math.nan, math.nan, 1.0, math.inf]
    found = [a for step, loss in enumerate(losses, 1) for a in detector.step(row(step, loss), now_s=0.0)]
    assert [(alert.kind, alert.step) for alert in found] == [("nan", 2), ("nan", 5)]


def test_budget__at_each_share__is_one_alert() -> None:
    costs = [CostUpdated(usd=usd, usd_per_hour=1.0) for usd in (4.9, 5.0, 5.1, 8.5, 9.0, 10.2, 11.0)]
    found = alerts_of(_STARTED, *costs, max_usd=10.0)
    assert [alert.text.split(",")[1].split(" of")[0].strip() for alert in found] == ["50%", "80%", "100%"]
    assert [alert.at for alert in found] == [2.0, 4.0, 6.0]
    (jumped,) = alerts_of(CostUpdated(usd=9.0, usd_per_hour=1.0), max_usd=10.0)
    assert "80% of resources.max_usd" in jumped.text
    assert not alerts_of(*costs)
    (half,) = alerts_of(costs[1], max_usd=10.0, noun="search")
    assert half.text == "the search has cost 5.00 USD, 50% of search.max_usd (10.00 USD)"


def test_forecast__of_an_end_after_the_limit__is_late() -> None:
    forecast = DeadlineForecast(
        deadline=7200.0, ends_at=3600.0, step=1, num_workers=1, needed_workers=1, max_workers=1, can_rent=False,
        limit="max_hours",
    )  # fmt: skip
    found = alerts_of(forecast, replace(forecast, ends_at=9000.0), replace(forecast, needed_workers=None))
    assert [(alert.kind, alert.text.split(" (")[0]) for alert in found] == [
        ("late", "with 1 worker the run ends 30m 00s after resources.max_hours are over"),
        ("late", "resources.max_hours were over"),
    ]


def test_membership_change__after_a_loss_or_notice__is_a_preemption() -> None:
    changes = [
        MembershipChangeStarted(
            generation=1, cause=cause, reason=f"node {'ab' * 28} {cause}", seconds_since_cause=0
        )
        for cause in ("notice", "loss", "growth", "yield", "hang", "failure")
    ]
    assert [(alert.kind, alert.text) for alert in alerts_of(*changes)] == [
        ("preempted", "node abab notice"),
        ("preempted", "node abab loss"),
    ]


def test_end__of_a_run__says_how_and_quotes_no_error() -> None:
    failed = RunFailed(error="RunError", message="ValueError: 'text of a customer'")
    diverged = RunFailed(error="DivergedError", message="step 3: the loss is nan")
    stopped = RunStopped(step=3, reason="it has cost 10.00 USD; the limit is 10.00 USD")
    found = alerts_of(RunFinished(step=3), RunStopped(step=3), stopped, failed, diverged)
    assert [(alert.kind, alert.text) for alert in found] == [
        ("finished", "finished"),
        ("finished", "stopped on request"),
        ("finished", "stopped: it has cost 10.00 USD; the limit is 10.00 USD"),
        ("failed", "failed: RunError"),
        ("nan", "the loss or gradient is not finite"),
        ("failed", "failed: DivergedError"),
    ]


def test_stalled__without_a_step_for_long__is_one_alert_with_what_is_waited_for() -> None:
    detector = AlertDetector(usd_limit=None, now_s=0.0)

    def happen(event: Event, now_s: float) -> None:
        assert not list(detector.event({"time": now_s} | event_to_record(event), now_s=now_s))

    assert detector.stalled(now_s=1e6, at=0.0) is None  # not started
    happen(_STARTED, 0.0)
    assert detector.stalled(now_s=1799.0, at=0.0) is None
    for step in range(1, 21):  # of 0.2 s
        list(detector.step(row(step, 2.0), now_s=2000.0))
    happen(WaitingForMachines(have=0, need=2), 2001.0)
    assert detector.stalled(now_s=2599.0, at=0.0) is None
    found = detector.stalled(now_s=2600.0, at=7.0)
    assert found is not None and found.at == 7.0
    assert found.text == "no step for 10m 00s after step 20; it waits for machines: 0 of 2 workers"
    assert detector.stalled(now_s=9999.0, at=8.0) is None  # once
    happen(GenerationStarting(generation=2, world_size=2, from_step=20, source="memory"), 3000.0)
    list(detector.step(row(21, 2.0), now_s=3000.0))
    again = detector.stalled(now_s=3600.0, at=9.0)
    assert again is not None and again.text == "no step for 10m 00s after step 21"
    list(detector.event({"time": 1.0} | event_to_record(RunFinished(step=21)), now_s=3600.0))
    assert detector.stalled(now_s=9999.0, at=10.0) is None


def test_stalled__with_slow_steps__waits_for_ten_of_them() -> None:
    detector = AlertDetector(usd_limit=None, now_s=0.0)
    list(detector.event({"time": 0.0} | event_to_record(_STARTED), now_s=0.0))
    for step in range(1, 5):
        list(detector.step(row(step, 2.0) | {"speed/step_s": 300.0}, now_s=0.0))
    assert detector.stalled(now_s=2999.0, at=0.0) is None
    assert detector.stalled(now_s=3000.0, at=0.0) is not None


def test_hung_rank__is_a_stall() -> None:
    (alert,) = alerts_of(_STARTED, RankHung(generation=1, rank=3, node="n", silent_s=90.0))
    assert (alert.kind, alert.text) == ("stalled", "rank 3 hung for 1m 30s")
