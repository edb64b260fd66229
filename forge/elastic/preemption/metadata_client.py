"""HTTP requests to the metadata service of a cloud.

Requests ignore the proxies of the environment (behind a proxy the link-local address belongs to another machine),
follow no redirect, and read at most `MAX_BODY_BYTES`. A cancelled request closes its connection at once, long poll
or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz

import aiohttp

MAX_BODY_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataResponse:
    """An answer of a metadata service."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: str

    def require_status(self, *statuses: int) -> MetadataResponse:
        """Return self. Raises: OSError if the status is none of these."""
        if self.status not in statuses:
            raise OSError(f"{self.url} answered with status {self.status}")
        return self

    def to_local_time(self, moment: float, *, clock: Callable[[], float]) -> float:
        """Convert a time of the service's clock to this machine's clock.

        The service's clock is read from its `Date` header, which has whole seconds: the result is never late and at
        most one second early.
        """
        date = parse_http_date(self.headers.get("Date", ""))
        return moment if date is None else moment + clock() - (date + 1)


def parse_http_date(text: str) -> float | None:
    """Convert `Tue, 09 Aug 2022 17:07:32 GMT` to seconds since the epoch; None if it is not such a date."""
    parsed = parsedate_tz(text)
    return None if parsed is None else float(mktime_tz(parsed))


async def fetch(url: str, *, headers: Mapping[str, str], timeout_s: float, method: str = "GET") -> MetadataResponse:
    """Send one request on a connection of its own.

    Args:
        timeout_s: for the whole exchange.

    Raises: aiohttp.ClientError, TimeoutError; OSError if the body is too long.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with (
        aiohttp.ClientSession(trust_env=False, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session,
        session.request(method, url, headers=headers, allow_redirects=False) as response,
    ):
        body = bytearray()
        async for chunk in response.content.iter_chunked(2**16):
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise OSError(f"{url} answered with more than {MAX_BODY_BYTES} bytes")
        return MetadataResponse(url=url, status=response.status, headers=response.headers, body=body.decode())
