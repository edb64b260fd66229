"""Deliver alerts to one receiver, on a thread of its own: retried, at a bounded rate, and said once if it fails.

At most one message of each kind waits: alerts of a kind that come faster than their messages may be sent become
one message with their number. So nothing grows, however slow a receiver is.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forge.events import AlertNotSent, AlertSent, Event
from forge.process import one_line
from forge.redact import redacted
from forge.runs.alerts.detect import Alert
from forge.runs.alerts.receivers import AlertMessage, AlertReceiver, ReceiverRefusedError
from forge.units import format_duration

RETRY_S = (2.0, 10.0, 60.0, 300.0)
"""Pauses between the attempts to send a message."""
PAUSE_S = 600.0
"""Least time between two messages of one of these kinds; the others are rare by themselves."""
_REPEATED = frozenset({"loss_spike", "nan", "stalled", "late", "preempted"})
_LAST_RETRY_S = 2.0
"""Of a run that is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """Alerts of one kind that no message is about yet."""

    first_at: float
    newest: Alert
    count: int

    def text(self) -> str:
        if self.count == 1:
            return self.newest.text
        return (
            f"{self.count} times in {format_duration(self.newest.at - self.first_at)}, the last: {self.newest.text}"
        )


class AlertDelivery:
    """Sends alerts to one receiver.

    Args:
        record: writes an event.
        sent_at: when the last message of each kind was sent, in seconds since the epoch.
    """

    def __init__(
        self,
        receiver: AlertReceiver,
        *,
        run_id: str,
        record: Callable[[Event], None],
        sent_at: Mapping[str, float],
        pause_s: float = PAUSE_S,
        retry_s: tuple[float, ...] = RETRY_S,
    ) -> None:
        self._receiver, self._run_id, self._record = receiver, run_id, record
        self._pause_s, self._retry_s = pause_s, retry_s
        self._sent_at = dict(sent_at)
        self._changed = threading.Condition()
        self._waiting: dict[str, _Waiting] = {}
        self._sending: _Waiting | None = None
        self._end_at: float | None = None
        """When to give up, on the monotonic clock, once the run is over."""
        self._thread = threading.Thread(target=self._run, name=f"alerts {receiver.name}", daemon=True)
        self._thread.start()

    def post(self, alert: Alert) -> None:
        """Let the thread send an alert; never waits for the receiver."""
        with self._changed:
            before = self._waiting.get(alert.kind)
            first_at, count = (before.first_at, before.count + 1) if before else (alert.at, 1)
            self._waiting[alert.kind] = _Waiting(first_at=first_at, newest=alert, count=count)
            self._changed.notify()

    def begin_end(self, *, timeout_s: float) -> None:
        """Send what waits without pauses, until a time limit."""
        with self._changed:
            self._end_at = time.monotonic() + timeout_s
            self._changed.notify()

    def wait_for_end(self) -> None:
        """Wait until everything is sent or the time of `begin_end` is over; record what was not sent."""
        assert self._end_at is not None, "begin_end comes first"
        self._thread.join(max(0.0, self._end_at - time.monotonic()))
        with self._changed:
            rest = [self._sending, *self._waiting.values()] if self._thread.is_alive() else []
            self._sending, self._waiting = None, {}
        for waiting in rest:
            if waiting is not None:
                self._record_failure(waiting, "it took too long when the run ended")

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            reason = self._send(waiting)
            with self._changed:
                is_mine = self._sending is waiting
                self._sending = None
            if is_mine and reason is not None:
                self._record_failure(waiting, reason)
            elif is_mine:
                self._record(AlertSent(**self._about(waiting)))

    def _next(self) -> _Waiting | None:
        """Wait for alerts that may be sent; None at the end."""
        with self._changed:
            while True:
                now = time.time()
                pauses = {
                    kind: max(0.0, self._sent_at.get(kind, 0.0) + self._pause_s - now) if kind in _REPEATED else 0.0
                    for kind in self._waiting
                }
                due = next(
                    (kind for kind, left_s in pauses.items() if not left_s or self._end_at is not None), None
                )
                if due is not None:
                    self._sending = self._waiting.pop(due)
                    self._sent_at[due] = now
                    return self._sending
                if self._end_at is not None:
                    return None
                self._changed.wait(min(pauses.values(), default=None))

    def _send(self, waiting: _Waiting) -> str | None:
        """Return why a message could not be sent; None if it was."""
        about = self._about(waiting)
        message = AlertMessage(
            run_id=self._run_id,
            kind=waiting.newest.kind,
            text=about["text"],
            step=waiting.newest.step,
            time=waiting.newest.at,
            count=waiting.count,
        )
        for pause_s in (*self._retry_s, None):
            try:
                self._receiver.send(message)
                return None
            except ReceiverRefusedError as error:
                return one_line(error)
            except Exception as error:  # receivers use libraries that raise many unrelated classes
                if pause_s is None or not self._wait_to_retry(pause_s):
                    return one_line(error)
        raise AssertionError("the last attempt returns")

    def _wait_to_retry(self, pause_s: float) -> bool:
        """Wait for a while. Returns: whether there is time for another attempt."""
        until = time.monotonic() + pause_s
        with self._changed:
            while (now := time.monotonic()) < until:
                if self._end_at is not None:
                    until = min(until, now + _LAST_RETRY_S)
                    if until >= self._end_at:
                        return False
                    self._changed.wait(until - now)
                    return True
                self._changed.wait(until - now)
        return True

    def _record_failure(self, waiting: _Waiting, reason: str) -> None:
        self._record(AlertNotSent(**self._about(waiting), reason=redacted(reason, os.environ)))

    def _about(self, waiting: _Waiting) -> dict[str, Any]:
        return {
            "receiver": self._receiver.name,
            "kind": waiting.newest.kind,
            "text": redacted(f"{self._run_id}: {waiting.text()}", os.environ),
            "count": waiting.count,
            "until": waiting.newest.at,
        }
