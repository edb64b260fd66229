"""Events of the trials of a search as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from forge.config.search import SearchSpec
from forge.report.trial_rows import format_value, values_in_short
from forge.runs.event_text import short
from forge.runs.trials import TrialTable
from forge.units import format_duration


class TrialEventDescriber:
    """Describes the events of one search, in their order, and keeps the table of its trials."""

    def __init__(self, search: SearchSpec, *, past: Iterable[Mapping[str, Any]] = ()) -> None:
        self.table = TrialTable(past)
        self._search = search

    def describe(self, event: Mapping[str, Any]) -> str | None:
        """Return one line for an event; None if it does not concern a trial."""
        known = self.table.trials.get(event.get("trial", 0))
        was_started = known is not None and known.start_s is not None
        self.table.add(event)
        trial = self.table.trials.get(event.get("trial", 0))
        if trial is None:
            return None
        text = f"trial {trial.number}"
        match event["event"]:
            case "TrialStarted":
                how = "resumed after" if was_started else "started in"
                text += f" {how} {format_duration(event['seconds'])}: {values_in_short(trial.values)}"
            case "TrialReported":
                text += f" step {event['step']} {self._value(event['value'])}"
            case "TrialExploited":
                text += f" continues from trial {event['donor']} at step {event['step']}: "
                text += values_in_short(trial.values)
            case "TrialEnded":
                text += f" {self._ended(event)}"
            case _:
                return None
        return short(text)

    def _ended(self, event: Mapping[str, Any]) -> str:
        scheduler, reason = self._search.scheduler.kind, event["reason"]
        by = f" by {scheduler}" if event["status"] == "stopped" and scheduler != "none" else ""
        why = f": {reason}" if reason and not (by and scheduler in reason) else ""
        value = f", {self._value(event['value'])}" if event["value"] is not None else ""
        return f"{event['status']}{by} at step {event['step']}{value}{why}"

    def _value(self, value: float | None) -> str:
        return f"{self._search.metric} {'is not a number' if value is None else format_value(value)}"
