"""Describe how long a job is expected to take."""

from __future__ import annotations

import time

from forge.plan.deadline_outlook import deadline_outlook
from forge.plan.durations import Forecast, WorldHours
from forge.plan.plan import DraftPlan
from forge.runs.event_text import workers
from forge.units import format_duration


def forecast_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Return the rows on the forecast; none if the plan has none."""
    found: Forecast | None = plan.forecast
    if found is None:
        return []
    sizes = list(dict.fromkeys((*found.worlds[:1], *found.worlds[-1:])))
    texts = [f"{hours_text(world)} with {workers(world.world_size)}" for world in sizes]
    lines = ["; ".join(texts)] if texts else []
    facts = [("time" if number == 0 else "", line) for number, line in enumerate([*lines, *found.notes])]
    return [*facts, *_deadline_facts(plan)]


def _deadline_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Say how many workers likely meet the deadline; a warning of the plan says if none do."""
    deadline, found = plan.job.resources.deadline, deadline_outlook(plan, now=time.time())
    if deadline is None:
        return []
    start = "" if deadline.at is not None else " after the start"
    if found is None:
        return [("deadline", f"{deadline}{start}; how long the run takes is unknown")]
    if found.fewest is None:
        return [("deadline", f"{deadline}{start}; likely missed with any number of workers of the job")]
    met = f"likely met with {workers(found.fewest.world_size)} or more"
    return [("deadline", f"{deadline}{start}; {met}: {hours_text(found.fewest)}")]


def hours_text(world: WorldHours) -> str:
    """Return the likely duration at a world size and its range."""
    low, likely, high = (
        format_duration(3600 * hours) for hours in (world.hours.low, world.hours.likely, world.hours.high)
    )
    return f"{likely} ({low} to {high})"
