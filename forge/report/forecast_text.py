"""Describe how long a job is expected to take."""

from __future__ import annotations

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
    return [("time" if number == 0 else "", line) for number, line in enumerate([*lines, *found.notes])]


def hours_text(world: WorldHours) -> str:
    """Return the likely duration at a world size and its range."""
    low, likely, high = (
        format_duration(3600 * hours) for hours in (world.hours.low, world.hours.likely, world.hours.high)
    )
    return f"{likely} ({low} to {high})"
