"""What the metadata services of AWS, GCP and Azure say of this machine's end.

One class a cloud. Each question returns what is announced at this moment: under a name that stays the same
from one answer to the next, the deadline in seconds since the epoch by this machine's clock, or None where
none is told. A service that is silent, refuses, or answers in another shape makes the question raise.

HTTP goes over asyncio's streams, not through urllib and threads: a question that is cancelled is gone at
once, long poll or not, and no proxy of the environment is ever asked.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.message import Message
from email.utils import mktime_tz, parsedate_tz
from http.client import HTTPResponse
from io import BytesIO
from typing import cast
from urllib.parse import urlsplit

Announced = Mapping[str, float | None]
Clock = Callable[[], float]

_TOKEN_LIFETIME_S = 21600
"""Six hours, the longest that EC2 gives."""
_FIRST_AZURE_TIMEOUT_S = 130.0
"""The first question of a machine's life switches scheduled events on, which takes up to two minutes."""


@dataclass(kw_only=True)
class Aws:
    """EC2's instance metadata, version 2: every question bears a token.

    Source: EC2 user guide, "Spot Instance interruption notices", "Use the Instance Metadata Service".
    """

    endpoint: str
    timeout_s: float
    clock: Clock
    token: str = ""
    renew_at: float = 0.0

    async def interruption(self) -> Announced:
        answer = await self._get("spot/instance-action")
        if answer.status == 404:
            return {}
        time = json.loads(answer.body)["time"]
        return {time: answer.by_our_clock(datetime.fromisoformat(time).timestamp(), clock=self.clock)}

    async def rebalance(self) -> Announced:
        answer = await self._get("events/recommendations/rebalance")
        return {} if answer.status == 404 else {json.loads(answer.body)["noticeTime"]: None}

    async def _get(self, key: str) -> _Answer:
        if self.clock() >= self.renew_at:
            await self._renew_token()
        answer = await self._get_with_token(key)
        if answer.status == 401:
            await self._renew_token()
            answer = await self._get_with_token(key)
        return answer.require(200, 404)

    async def _get_with_token(self, key: str) -> _Answer:
        headers = {"X-aws-ec2-metadata-token": self.token}
        return await _request(f"{self.endpoint}/latest/meta-data/{key}", headers, timeout_s=self.timeout_s)

    async def _renew_token(self) -> None:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFETIME_S), "Content-Length": "0"}
        url = f"{self.endpoint}/latest/api/token"
        answer = await _request(url, headers, method="PUT", timeout_s=self.timeout_s)
        self.token = answer.require(200).body.strip()
        self.renew_at = self.clock() + _TOKEN_LIFETIME_S - 60


@dataclass(kw_only=True)
class Gcp:
    """One key of Compute Engine's metadata; a question is held open until the key's value is another.

    Source: Compute Engine documentation, "Create and use Spot VMs", "Query VM metadata".
    """

    url: str
    value: str
    """What announces the end."""
    notice_s: float
    """From the announcement to the end."""
    timeout_s: float
    clock: Clock
    etag: str = "0"
    """Of the value last seen; at first of none, so that the first question is answered at once."""

    async def ask(self) -> Announced:
        hold_s = max(1, round(self.timeout_s))
        url = f"{self.url}?wait_for_change=true&last_etag={self.etag}&timeout_sec={hold_s}"
        answer = await _request(url, {"Metadata-Flavor": "Google"}, timeout_s=hold_s + self.timeout_s)
        self.etag = answer.require(200).headers.get("ETag", "0")
        return {self.value: self.clock() + self.notice_s} if answer.body.strip() == self.value else {}


@dataclass(kw_only=True)
class Azure:
    """Azure's scheduled events, which tell each machine of a scale set of all its machines.

    Source: Azure documentation, "Scheduled Events for Linux VMs", "Azure Instance Metadata Service".
    """

    endpoint: str
    timeout_s: float
    clock: Clock
    machine: str = ""
    """This machine's name, once it is known."""
    has_answered: bool = False

    async def ask(self) -> Announced:
        if not self.machine:
            name = await self._get("instance/compute/name?api-version=2021-02-01&format=text", self.timeout_s)
            self.machine = name.body.strip()
        timeout_s = self.timeout_s if self.has_answered else _FIRST_AZURE_TIMEOUT_S
        answer = await self._get("scheduledevents?api-version=2020-07-01", timeout_s)
        self.has_answered = True
        return {
            event["EventId"]: self._deadline(event, answer)
            for event in json.loads(answer.body)["Events"]
            if event["EventType"] in ("Preempt", "Terminate") and self.machine in event["Resources"]
        }

    def _deadline(self, event: Mapping[str, str], answer: _Answer) -> float:
        """An event that has begun says no time any more: there is none left."""
        moment = _parse_date(event["NotBefore"])
        return self.clock() if moment is None else answer.by_our_clock(moment, clock=self.clock)

    async def _get(self, key: str, timeout_s: float) -> _Answer:
        answer = await _request(f"{self.endpoint}/metadata/{key}", {"Metadata": "true"}, timeout_s=timeout_s)
        return answer.require(200)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    url: str
    status: int
    headers: Message
    body: str

    def require(self, *statuses: int) -> _Answer:
        if self.status not in statuses:
            raise OSError(f"{self.url} answered {self.status}")
        return self

    def by_our_clock(self, moment: float, *, clock: Clock) -> float:
        """A time by the service's clock as one by ours.

        The service's clock is read off its `Date`, in whole seconds: the result is never late, and at most
        a second early.
        """
        date = _parse_date(self.headers.get("Date", ""))
        return moment if date is None else moment + clock() - (date + 1)


def _parse_date(text: str) -> float | None:
    """`Tue, 09 Aug 2022 17:07:32 GMT` in seconds since the epoch; None for what is no such date."""
    parsed = parsedate_tz(text)
    return None if parsed is None else float(mktime_tz(parsed))


async def _request(url: str, headers: Mapping[str, str], *, method: str = "GET", timeout_s: float) -> _Answer:
    place = urlsplit(url)
    target = place._replace(scheme="", netloc="").geturl()
    lines = [f"{method} {target} HTTP/1.1", f"Host: {place.netloc}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode())
            received = await _receive(reader)
        finally:
            writer.close()
    response = HTTPResponse(cast(socket.socket, _Received(received)), method=method)
    response.begin()
    return _Answer(url=url, status=response.status, headers=response.headers, body=response.read().decode())


async def _receive(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return head + (await reader.readexactly(int(length[1])) if length else await reader.read())


class _Received:
    """An answer that has come, in the one way in which HTTPResponse reads."""

    def __init__(self, received: bytes) -> None:
        self._received = received

    def makefile(self, mode: str) -> BytesIO:
        return BytesIO(self._received)
