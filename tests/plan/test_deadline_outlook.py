"""A deadline against the forecast of a plan, before the run starts."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from forge.config.load import load_job
from forge.errors import JobFileError
from forge.plan.bill import make_bill
from forge.plan.deadline_outlook import deadline_warning
from forge.plan.durations import Forecast, WorldHours
from forge.plan.plan import DraftPlan, plan_from_json, plan_to_json
from forge.plan.throughput import Estimate
from forge.pricing.offers import OfferTable
from forge.report.text import plan_facts
from tests.support.jobs import tiny_plan

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC).timestamp()


def plan_until(deadline: str, **changes: Any) -> DraftPlan:
    """A plan that takes 8, 4.5, 3.2 and 2.5 hours on one to four workers, a fifth more or less."""
    hours = zip((1, 2, 3, 4), (8.0, 4.5, 3.2, 2.5), strict=True)
    worlds = tuple(
        WorldHours(
            world_size=size,
            hours=Estimate(low=0.8 * likely, likely=likely, high=1.2 * likely),
            step_s=1.0,
            evaluation_s=0.0,
            checkpoint_s=0.0,
            startup_s=0.0,
        )
        for size, likely in hours
    )
    plan = tiny_plan(resources__deadline=deadline, **changes)
    return replace(plan, forecast=Forecast(worlds=worlds, notes=()))


@pytest.mark.parametrize(
    ("deadline", "expected"),
    [
        ("10h", None),
        ("4h", None),
        ("2026-12-01T14:35Z", None),
        (
            "132m",
            "132m is likely missed in the 2h 12m that are left: with 4 workers the run likely takes 2h 30m. "
            "Possible: about 5 workers of this kind, or a deadline after 2h 30m to 3h 00m",
        ),
        ("1h", "1h cannot be met in the 1h 00m that are left"),
        (
            "2026-12-01T11:00Z",
            "has passed 1h 00m ago: with 4 workers the run likely takes 2h 30m. Possible: a deadline after 2h 30m",
        ),
    ],
)
def test_deadline_warning__each_deadline__says_what_is_possible(deadline: str, expected: str | None) -> None:
    found = deadline_warning(plan_until(deadline), now=NOW)
    if expected is None:
        assert found is None
    else:
        assert found is not None and expected in found


def test_plan_facts__deadline__names_the_fewest_workers() -> None:
    plan = plan_until("4h")
    assert dict(plan_facts(plan))["deadline"] == (
        "4h after the start; likely met with 3 workers or more: 3h 12m (2h 33m to 3h 50m)"
    )
    unknown = replace(plan, forecast=None)
    assert "deadline" not in dict(plan_facts(unknown)) and deadline_warning(unknown, now=NOW) is None
    assert plan_from_json(plan_to_json(plan)).job.resources.deadline == plan.job.resources.deadline


def test_bill__deadline__limits_the_hours() -> None:
    empty = OfferTable(offers=())
    assert make_bill(plan_until("4h"), empty).max_hours == pytest.approx(4)
    assert make_bill(plan_until("4h", resources__max_hours=3.0), empty).max_hours == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{deadline: soon}", r"resources\.deadline.*write it like 48h, 2d or 2026-12-01T18:00Z"),
        ("{deadline: 2026-12-01T18:00:00}", r"resources\.deadline.*has no time zone"),
        ("{deadline: 48}", r"resources\.deadline.*write it like 48h"),
        ("{deadline: 48h, engine: ray-train}", r"resources\.deadline.*requires engine: elastic"),
    ],
)
def test_load__bad_deadline__names_the_key_and_a_good_value(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(f"name: a\nresources: {text}\n")
    with pytest.raises(JobFileError, match=message):
        load_job(tmp_path / "job.yaml")


def test_job__search_with_a_deadline__names_max_hours() -> None:
    space = {"space": {"training.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}, "metric": "eval/loss"}
    with pytest.raises(ValueError, match=r"is for single runs; a search ends by search\.max_hours"):
        tiny_plan(resources__deadline="48h", search=space)
