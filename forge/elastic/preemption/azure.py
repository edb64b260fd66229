"""Scheduled events of Azure that end this machine.

Source: Azure documentation, "Scheduled Events for Linux VMs", "Azure Instance Metadata Service".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from forge.elastic.preemption.metadata_client import MetadataResponse, fetch, parse_http_date
from forge.elastic.preemption.notice import Announcements, PollInterval, Watcher, announcement_watcher

_FIRST_TIMEOUT_S = 130.0
"""The first request of a machine's life enables scheduled events, which takes up to two minutes."""


def azure_watchers(environment: Mapping[str, str], *, interval: PollInterval) -> list[Watcher]:
    """Watch for events that preempt or terminate this machine."""
    endpoint = environment.get("AZURE_METADATA_ENDPOINT") or "http://169.254.169.254"
    events = AzureScheduledEvents(endpoint=endpoint.rstrip("/"), timeout_s=interval.timeout_s, clock=interval.clock)
    return [announcement_watcher("azure", events.poll, interval=interval)]


@dataclass(kw_only=True)
class AzureScheduledEvents:
    """Azure's scheduled events, which list those of all machines of a scale set."""

    endpoint: str
    timeout_s: float
    clock: Callable[[], float]
    machine: str = ""
    """This machine's name, once it is known."""
    has_answered: bool = False

    async def poll(self) -> Announcements:
        """The events that preempt or terminate this machine."""
        if not self.machine:
            name = await self._get("instance/compute/name?api-version=2021-02-01&format=text", self.timeout_s)
            self.machine = name.body.strip()
        timeout_s = self.timeout_s if self.has_answered else _FIRST_TIMEOUT_S
        response = await self._get("scheduledevents?api-version=2020-07-01", timeout_s)
        self.has_answered = True
        return {
            event["EventId"]: self._deadline(event, response)
            for event in json.loads(response.body)["Events"]
            if event["EventType"] in ("Preempt", "Terminate") and self.machine in event["Resources"]
        }

    def _deadline(self, event: Mapping[str, str], response: MetadataResponse) -> float:
        """Parse `NotBefore`; an event that has started has none, so its deadline is now."""
        moment = parse_http_date(event["NotBefore"])
        return self.clock() if moment is None else response.to_local_time(moment, clock=self.clock)

    async def _get(self, key: str, timeout_s: float) -> MetadataResponse:
        url = f"{self.endpoint}/metadata/{key}"
        return (await fetch(url, headers={"Metadata": "true"}, timeout_s=timeout_s)).require_status(200)
