"""Spot interruption notices and rebalance recommendations of AWS.

Source: EC2 user guide, "Spot Instance interruption notices", "Use the Instance Metadata Service".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from forge.elastic.preemption.metadata_client import MetadataResponse, fetch
from forge.elastic.preemption.notice import Announcements, PollInterval, Watcher, announcement_watcher

_TOKEN_LIFETIME_S = 21600
"""Six hours, the longest that EC2 allows."""


def aws_watchers(environment: Mapping[str, str], *, interval: PollInterval) -> list[Watcher]:
    """Watch for interruptions (certain) and rebalance recommendations (uncertain)."""
    endpoint = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    metadata = AwsMetadata(endpoint=endpoint.rstrip("/"), timeout_s=interval.timeout_s, clock=interval.clock)
    return [
        announcement_watcher("aws", metadata.interruption, interval=interval),
        announcement_watcher("aws", metadata.rebalance, interval=interval, is_certain=False),
    ]


@dataclass(kw_only=True)
class AwsMetadata:
    """EC2's instance metadata service, version 2: every request carries a session token."""

    endpoint: str
    timeout_s: float
    clock: Callable[[], float]
    token: str = ""
    renew_at: float = 0.0

    async def interruption(self) -> Announcements:
        """The spot interruption, with its deadline, if one is announced."""
        response = await self._get("spot/instance-action")
        if response.status == 404:
            return {}
        time = json.loads(response.body)["time"]
        return {time: response.to_local_time(datetime.fromisoformat(time).timestamp(), clock=self.clock)}

    async def rebalance(self) -> Announcements:
        """The rebalance recommendation, which has no deadline, if there is one."""
        response = await self._get("events/recommendations/rebalance")
        return {} if response.status == 404 else {json.loads(response.body)["noticeTime"]: None}

    async def _get(self, key: str) -> MetadataResponse:
        if self.clock() >= self.renew_at:
            await self._renew_token()
        response = await self._get_with_token(key)
        if response.status == 401:
            await self._renew_token()
            response = await self._get_with_token(key)
        return response.require_status(200, 404)

    async def _get_with_token(self, key: str) -> MetadataResponse:
        headers = {"X-aws-ec2-metadata-token": self.token}
        return await fetch(f"{self.endpoint}/latest/meta-data/{key}", headers=headers, timeout_s=self.timeout_s)

    async def _renew_token(self) -> None:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFETIME_S)}
        url = f"{self.endpoint}/latest/api/token"
        response = await fetch(url, headers=headers, method="PUT", timeout_s=self.timeout_s)
        self.token = response.require_status(200).body.strip()
        self.renew_at = self.clock() + _TOKEN_LIFETIME_S - 60
