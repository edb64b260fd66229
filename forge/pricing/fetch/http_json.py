"""Ask a public HTTP service for JSON: bounded in size and time, and patient with throttling."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from forge.errors import ClusterError

MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What reading an entry of another form than the documented one raises."""
_BUSY = (429, 500, 502, 503, 504)
_MAX_WAIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonClient:
    """Asks one service."""

    name: str
    """For messages."""
    headers: Mapping[str, str]
    timeout_s: float = 30.0
    attempts: int = 5
    max_bytes: int = 64 * 2**20
    sleep: Callable[[float], None] = time.sleep

    def get(self, url: str) -> Any:
        """Return the JSON at a URL; wait and repeat while the service is busy, as long as it asks for.

        Raises: ClusterError if it cannot be reached, refuses, or answers something else.
        """
        host = urlsplit(url).netloc
        for attempt in range(1, self.attempts + 1):
            try:
                return json.loads(self._read(url))
            except urllib.error.HTTPError as error:
                with error:
                    busy = error.code in _BUSY
                    if not busy or attempt == self.attempts:
                        again = f" {attempt} times" if busy else ""
                        raise ClusterError(f"{self.name} ({host}) answered {error.code}{again}") from None
                    wait_s = _seconds(error.headers.get("Retry-After"), otherwise=2.0 ** (attempt - 1))
                self.sleep(wait_s)
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                raise ClusterError(f"{self.name} ({host}) cannot be reached: {reason}") from None
            except (ValueError, RecursionError):
                raise ClusterError(f"{self.name} ({host}) did not answer JSON") from None
        raise AssertionError("the last attempt returns or raises")

    def _read(self, url: str) -> bytes:
        request = urllib.request.Request(url, headers={"Accept": "application/json", **self.headers})
        with _OPENER.open(request, timeout=self.timeout_s) as response:
            content: bytes = response.read(self.max_bytes + 1)
        if len(content) > self.max_bytes:
            raise ClusterError(f"{self.name} answered more than {self.max_bytes >> 20} MiB")
        return content


def _seconds(text: str | None, *, otherwise: float) -> float:
    """Return the header's number of seconds, at most half a minute; a date in it is not read."""
    try:
        return min(max(float(text or ""), 0.0), _MAX_WAIT_S)
    except ValueError:
        return otherwise


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for a refusal: the headers may have a key, which belongs to this server only."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect())
