"""Preemptions and terminating maintenance of Google Compute Engine.

Source: Compute Engine documentation, "Create and use Spot VMs", "Query VM metadata", "Handle GPU host maintenance
events".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from forge.elastic.preemption.metadata_client import fetch
from forge.elastic.preemption.notice import Announcements, PollInterval, Watcher, announcement_watcher

_VALUES = {"preempted": ("TRUE", 30), "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE", 60)}
"""Metadata key → the value that announces the end, and the seconds until then.

Maintenance is announced an hour ahead on machines with a GPU and a minute ahead on others, without a time: a minute
is safe for both.
"""


def gcp_watchers(environment: Mapping[str, str], *, interval: PollInterval) -> list[Watcher]:
    """Watch for preemption and for maintenance that terminates the machine."""
    host = environment.get("GCE_METADATA_HOST") or "metadata.google.internal"
    keys = [
        GcpMetadataKey(
            url=f"http://{host}/computeMetadata/v1/instance/{key}",
            value=value,
            notice_s=notice_s,
            timeout_s=interval.timeout_s,
            clock=interval.clock,
        )
        for key, (value, notice_s) in _VALUES.items()
    ]
    return [announcement_watcher("gcp", key.poll, interval=interval) for key in keys]


@dataclass(kw_only=True)
class GcpMetadataKey:
    """One metadata key; the service holds a request open until the key's value changes."""

    url: str
    value: str
    """The value that announces the end of the machine."""
    notice_s: float
    """From the announcement to the end."""
    timeout_s: float
    clock: Callable[[], float]
    etag: str = "0"
    """Of the value seen last. The initial one matches no value, so that the first request is answered at once."""

    async def poll(self) -> Announcements:
        """Wait for a change, at most about `timeout_s`, and return what the value announces."""
        hold_s = max(1, round(self.timeout_s))
        url = f"{self.url}?wait_for_change=true&last_etag={self.etag}&timeout_sec={hold_s}"
        response = await fetch(url, headers={"Metadata-Flavor": "Google"}, timeout_s=hold_s + self.timeout_s)
        self.etag = response.require_status(200).headers.get("ETag", "0")
        return {self.value: self.clock() + self.notice_s} if response.body.strip() == self.value else {}
