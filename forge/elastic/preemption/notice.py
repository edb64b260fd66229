"""The notice that a preemption watcher reports, and the settings that all watchers share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

Announcements = Mapping[str, float | None]
"""Announced ends of this machine: a key that stays the same between answers → deadline in seconds since the epoch
by this machine's clock, or None if the service gives no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """This machine will be taken away."""

    source: str
    """`aws`, `gcp`, `azure`, `kubernetes` or `ray`."""
    deadline: float | None
    """Seconds since the epoch by this machine's clock; None if no time was given."""
    is_certain: bool = True
    """False for the rebalance recommendation of AWS, which announces a higher risk only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PollInterval:
    """How often a watcher asks, how long it waits for an answer, and its clock."""

    pause_s: float = 0.5
    """Between two requests: a notice is seen within a second."""
    timeout_s: float = 3.0
    """Of one request."""
    clock: Callable[[], float] = time.time
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """One source of notices, polled by `watch`."""

    source: str
    poll: Callable[[], Awaitable[Mapping[str, Notice]]]
    """Returns the notices in force now, under keys that stay the same from one answer to the next."""
    pause_s: float


def announcement_watcher(
    source: str,
    fetch: Callable[[], Awaitable[Announcements]],
    *,
    interval: PollInterval,
    is_certain: bool = True,
) -> Watcher:
    """A watcher that turns the announcements of a metadata service into notices."""

    async def poll() -> Mapping[str, Notice]:
        return {
            key: Notice(source=source, deadline=deadline, is_certain=is_certain)
            for key, deadline in (await fetch()).items()
        }

    return Watcher(source=source, poll=poll, pause_s=interval.pause_s)
