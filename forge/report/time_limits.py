"""What a run's newest forecasts say about `resources.deadline` and `resources.max_hours`."""

from __future__ import annotations

from typing import Any

from forge.runs.event_text import deadline_text, is_late
from forge.runs.reader import RunSummary

_LIMITS = ("deadline", "max_hours")


def deadline_facts(run: RunSummary) -> list[tuple[str, str]]:
    """Return one row for each limit of time that the run is compared with."""
    return [(limit, deadline_text(event)) for limit, event in _newest(run).items()]


def late_texts(run: RunSummary) -> dict[str, str]:
    """Say of each limit that a run does not keep, or did not, by how much; nothing of one that ended in time."""
    ended_at = run.events[-1]["time"] if run.events and run.status != "running" else None
    return {
        limit: deadline_text(event)
        for limit, event in _newest(run).items()
        if is_late(event) and (ended_at is None or ended_at > (event["deadline"] or 0.0))
    }


def _newest(run: RunSummary) -> dict[str, dict[str, Any]]:
    found = {limit: run.newest("DeadlineForecast", limit=limit) for limit in _LIMITS}
    return {limit: event for limit, event in found.items() if event is not None}
