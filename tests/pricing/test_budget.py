"""Cost limits, and the meter that adds up what machines cost."""

from __future__ import annotations

import pytest

from forge.errors import ClusterError
from forge.pricing.budget import CostLimits, CostMeter, read_price, read_saving


def meter(limits: CostLimits = CostLimits(), *, spent_usd: float = 0.0) -> CostMeter:  # noqa: B008 (frozen)
    """A meter whose head `h` costs 1 USD per hour."""
    return CostMeter(limits, head="h", head_usd_per_hour=1.0, spent_usd=spent_usd)


def test_usd_per_hour__machine_with_two_agents__counts_once() -> None:
    counted = meter()
    counted.add_agent("a", host="h", usd_per_hour=1.0)
    counted.add_agent("b", host="x", usd_per_hour=2.0)
    counted.add_agent("c", host="x", usd_per_hour=2.0)
    assert counted.usd_per_hour == 3.0
    counted.remove_agent("b")
    assert counted.usd_per_hour == 3.0
    counted.remove_agent("c")
    assert counted.usd_per_hour == 1.0


def test_count__rate_changes_in_between__adds_each_rate_for_its_time() -> None:
    counted = meter(spent_usd=5.0)
    counted.count(100.0)
    counted.count(100.0 + 1800)
    counted.add_agent("a", host="x", usd_per_hour=3.0)
    counted.count(100.0 + 3600)
    assert counted.spent_usd == pytest.approx(5.0 + 0.5 * 1.0 + 0.5 * 4.0)


def test_count__spot_machines__adds_what_they_cost_less_than_on_demand() -> None:
    counted = CostMeter(CostLimits(), head="h", head_usd_per_hour=1.0, spent_usd=2.0, saved_usd=4.0)
    for node in ("a", "b"):  # two agents on one machine
        counted.add_agent(node, host="x", usd_per_hour=3.0, saving_usd_per_hour=6.0)
    counted.add_agent("c", host="y", usd_per_hour=9.0)
    counted.count(0.0)
    counted.count(1800.0)
    assert (counted.spent_usd, counted.saved_usd) == (2.0 + 6.5, 4.0 + 3.0)


@pytest.mark.parametrize(
    ("price", "on_demand", "saving"),
    [("3", "9", 6.0), ("9", "9", 0.0), ("9", "3", 0.0), ("", "9", 0.0), ("3", "", 0.0)],
)
def test_read_saving__known_or_not__difference_or_zero(price: str, on_demand: str, saving: float) -> None:
    assert read_saving({"FORGE_USD_PER_HOUR": price, "FORGE_ON_DEMAND_USD_PER_HOUR": on_demand}) == saving


def test_take_report__same_rate__is_due_once_per_minute() -> None:
    counted = meter()
    assert [counted.take_report(at) for at in (0.0, 1.0, 59.0, 60.0, 61.0)] == [True, False, False, True, False]
    counted.add_agent("a", host="x", usd_per_hour=3.0)
    assert [counted.take_report(at) for at in (62.0, 63.0)] == [True, False]


def test_take_report__no_price_known__is_never_due() -> None:
    counted = CostMeter(CostLimits(), head="h", head_usd_per_hour=None, spent_usd=0.0)
    assert not any(counted.take_report(at) for at in (0.0, 60.0, 600.0))


@pytest.mark.parametrize(
    ("limits", "usd_per_hour", "violation"),
    [
        (CostLimits(), None, None),
        (CostLimits(usd=2.0), 2.0, None),
        (CostLimits(usd=0.5), 2.0, "it has cost 1.00 USD; the limit is 0.50 USD"),
        (CostLimits(usd_per_hour=3.0), 2.0, None),
        (CostLimits(usd_per_hour=2.5), 2.0, "its machines cost 3.00 USD per hour; the limit is 2.50"),
        (CostLimits(usd=1000.0), None, "its cost is limited, but the price of x is unknown"),
    ],
)
def test_violation__limits_and_price__name_the_first_problem(
    limits: CostLimits, usd_per_hour: float | None, violation: str | None
) -> None:
    counted = meter(limits, spent_usd=1.0)
    counted.add_agent("a", host="x", usd_per_hour=usd_per_hour)
    found = counted.violation()
    assert found is None if violation is None else str(found).startswith(violation)


def test_violation__no_agent_yet__is_none() -> None:
    assert meter(CostLimits(usd=0.5), spent_usd=1.0).violation() is None


@pytest.mark.parametrize("text", ["free", "-1", "inf", "nan"])
def test_read_price__not_a_price__is_rejected_by_name(text: str) -> None:
    with pytest.raises(ClusterError, match="FORGE_USD_PER_HOUR"):
        read_price({"FORGE_USD_PER_HOUR": text})


@pytest.mark.parametrize("environment", [{}, {"FORGE_USD_PER_HOUR": ""}])
def test_read_price__not_set__is_none(environment: dict[str, str]) -> None:
    assert read_price(environment) is None


def test_capped_by__limits_of_job_and_cluster__takes_the_lower() -> None:
    limits = CostLimits(usd=5.0, usd_per_hour=3.0)
    assert limits.capped_by({"FORGE_MAX_USD_PER_HOUR": "2.5"}) == CostLimits(usd=5.0, usd_per_hour=2.5)
    assert limits.capped_by({"FORGE_MAX_USD_PER_HOUR": "9"}) == limits
    assert limits.capped_by({}) == limits
