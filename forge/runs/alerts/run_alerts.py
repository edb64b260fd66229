"""Follow the records of a run and send its alerts, on threads beside the recorder: `alerts:` of the job file.

Every message is sent at least once: it counts as sent when the event `AlertSent` is written, which a kill may
prevent. When the run goes on, its records are read from the beginning, and alerts that no event is about are sent,
unless they are older than `MAX_AGE_S`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from heapq import merge
from operator import itemgetter
from pathlib import Path

from forge.events import Event, TrackingDegraded
from forge.plan.plan import Plan
from forge.process import one_line
from forge.runs.alerts.delivery import AlertDelivery
from forge.runs.alerts.detect import Alert, AlertDetector
from forge.runs.alerts.receivers import AlertReceiver, Command, WandbAlerts, Webhook
from forge.runs.records import Record, RecordReader
from forge.runs.trackers.wandb_tracker import WandbTracker

MAX_AGE_S = 3600.0
"""Older alerts of a run that is resumed are not sent: they are no news."""
END_S = 20.0
"""How long the end of a run waits for its last messages."""
_POLL_S = 5.0


@dataclass(slots=True, kw_only=True)
class _History:
    """What events say about the messages to one receiver, by kind."""

    until: dict[str, float] = field(default_factory=dict)
    """Time of the newest alert that a message was about."""
    sent_at: dict[str, float] = field(default_factory=dict)


class RunAlerts:
    """Sends the alerts of one run from the start of its recorder until it is closed.

    Args:
        folder: of the run.
        kinds: which alerts are sent.
        usd_limit: key and value of the job's cost limit, if it has one.
        noun: what costs, `run` or `search`.
        record: writes an event; called on other threads.
    """

    def __init__(
        self,
        folder: Path,
        *,
        receivers: Sequence[AlertReceiver],
        kinds: frozenset[str],
        usd_limit: tuple[str, float] | None,
        noun: str = "run",
        record: Callable[[Event], None],
    ) -> None:
        self._folder, self._receivers, self._kinds, self._record = folder, receivers, kinds, record
        self._detector = AlertDetector(usd_limit=usd_limit, noun=noun, now_s=time.monotonic())
        self._readers = (RecordReader(folder, kind="step"), RecordReader(folder, kind="event"))
        self._history = {receiver.name: _History() for receiver in receivers}
        self._deliveries: list[AlertDelivery] = []
        self._news = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._follow, name="alerts", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let the thread read the new records."""
        self._news.set()

    def close(self, *, timeout_s: float = END_S) -> None:
        """Send the last alerts, or record that they were not sent in time."""
        until = time.monotonic() + timeout_s
        self._is_over = True
        self._news.set()
        self._thread.join(timeout_s)
        for delivery in self._deliveries:
            delivery.begin_end(timeout_s=max(0.0, until - time.monotonic()))
        for delivery in self._deliveries:
            delivery.wait_for_end()

    def _follow(self) -> None:
        try:
            self._start(self._read())
            while True:
                self._news.clear()
                is_over = self._is_over
                alerts = self._read()
                stalled = self._detector.stalled(now_s=time.monotonic(), at=time.time())
                for alert in [*alerts, *([stalled] if stalled is not None else [])]:
                    self._post(alert)
                if is_over:
                    return
                self._news.wait(_POLL_S)
        except Exception as error:  # a bug or a broken disk: the run does not depend on alerts
            with contextlib.suppress(OSError):
                self._record(TrackingDegraded(reason=f"no further alerts are sent: {one_line(error)}"))

    def _start(self, alerts: Sequence[Alert]) -> None:
        """Start the deliveries, and post those alerts of earlier records that are still news."""
        self._deliveries = [
            AlertDelivery(
                receiver,
                run_id=self._folder.name,
                record=self._record,
                sent_at=self._history[receiver.name].sent_at,
            )
            for receiver in self._receivers
        ]
        since = time.time() - MAX_AGE_S
        for alert in alerts:
            if alert.at >= since:
                self._post(alert, is_old=True)

    def _read(self) -> list[Alert]:
        now_s = time.monotonic()
        alerts: list[Alert] = []
        steps, events = self._readers
        new = list(events.read())  # first, so that the steps before them are read with them
        for record in merge(steps.read(), new, key=itemgetter("time")):
            if "event" in record:
                self._remember(record)
                alerts += self._detector.event(record, now_s=now_s)
            else:
                alerts += self._detector.step(record, now_s=now_s)
        return alerts

    def _remember(self, record: Record) -> None:
        """Keep what was sent before this process started."""
        if (
            self._deliveries
            or record["event"] not in ("AlertSent", "AlertNotSent")
            or record["receiver"] not in self._history
        ):
            return
        history, kind = self._history[record["receiver"]], record["kind"]
        history.until[kind] = max(record["until"], history.until.get(kind, 0.0))
        history.sent_at[kind] = record["time"]

    def _post(self, alert: Alert, *, is_old: bool = False) -> None:
        """Give an alert to every receiver; an old one only to those that were not sent it before."""
        if alert.kind not in self._kinds:
            return
        for receiver, delivery in zip(self._receivers, self._deliveries, strict=True):
            if not is_old or alert.at > self._history[receiver.name].until.get(alert.kind, 0.0):
                delivery.post(alert)


def start_alerts(
    plan: Plan,
    *,
    folder: Path,
    record: Callable[[Event], None],
    call_wandb: Callable[[Callable[[WandbTracker], None]], Future[None]] | None = None,
) -> RunAlerts | None:
    """Start the alerts of a run; None if its job has none.

    Args:
        record: writes an event; called on other threads.
        call_wandb: lets the writer of W&B's run do something; None if there is none, and so no W&B alerts.
    """
    spec = plan.job.alerts
    if spec is None:
        return None
    receivers: list[AlertReceiver] = []
    if spec.webhook is not None:
        receivers.append(Webhook(spec.webhook))
    if spec.command is not None:
        receivers.append(Command(spec.command, folder=folder))
    if spec.wandb and call_wandb is not None:
        receivers.append(WandbAlerts(call_wandb))
    return RunAlerts(
        folder,
        receivers=receivers,
        kinds=spec.kinds(is_search=plan.search is not None),
        usd_limit=plan.job.usd_limit,
        noun="run" if plan.search is None else "search",
        record=record,
    )
