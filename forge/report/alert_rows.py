"""The alerts of a run as rows of a table: when, of what kind, the message, and which receivers took it.

An alert that several receivers of `alerts:` get is one row. It appears with the first event about it,
`AlertSent` or `AlertNotSent`; receivers that are still being tried are not in it yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from forge.runs.event_text import short
from forge.units import format_date

ALERT_COLUMNS = ("when", "kind", "message", "delivery")
_MAX_KEPT = 1000
_MAX_RECEIVERS = 10


class AlertTable:
    """The newest alerts in the events of a run.

    Args:
        run_id: of the run; its messages begin with it, which their rows leave out.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = (), *, run_id: str) -> None:
        self._prefix = f"{run_id}: "
        self._rows: dict[tuple[str, float | None, str], dict[str, str]] = {}
        """Outcome by receiver, of each alert: its kind, time and message."""
        self.num_alerts = 0
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take an event of the run; those about other things than alerts change nothing."""
        match event["event"]:
            case "AlertSent":
                outcome = "delivered"
            case "AlertNotSent":
                outcome = f"not delivered, {event['reason']}"
            case _:
                return
        key = (event["kind"], event["until"], event["text"])
        if key not in self._rows:
            self._rows[key] = {}
            self.num_alerts += 1
            if len(self._rows) > _MAX_KEPT:
                self._rows.pop(next(iter(self._rows)))
        outcomes = self._rows[key]
        if event["receiver"] in outcomes or len(outcomes) < _MAX_RECEIVERS:
            outcomes[event["receiver"]] = outcome

    def rows(self, *, limit: int) -> dict[str, list[str]]:
        """Return the texts of the newest alerts, by their number, in the order in which they were sent."""
        first = self.num_alerts - len(self._rows)
        numbered = list(enumerate(self._rows.items(), start=first))[-limit:]
        found: dict[str, list[str]] = {}
        for number, ((kind, at, text), outcomes) in numbered:
            texts = (kind, text.removeprefix(self._prefix), _delivery(outcomes))
            found[f"{number}"] = [format_date(at, timespec="seconds"), *map(short, texts)]
        return found


def _delivery(outcomes: Mapping[str, str]) -> str:
    """`delivered to webhook, W&B; command: not delivered, page ended with exit status 1`."""
    taken = [receiver for receiver, outcome in outcomes.items() if outcome == "delivered"]
    failed = [f"{receiver}: {outcome}" for receiver, outcome in outcomes.items() if outcome != "delivered"]
    return "; ".join([*([f"delivered to {', '.join(taken)}"] if taken else []), *failed])
