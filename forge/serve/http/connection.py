"""A connection that bounds the time and the size of request headers, which uvicorn's own does not, and that answers
requests for another protocol in HTTP/1.1, with their bodies. `ConnectionLimit` bounds how many are open.

uvicorn's `limit_concurrency` is not used: it refuses requests, but keeps their connections, and those without a
request are not refused at all; and it knows no clients.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections import Counter
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from forge.serve.http.errors import ApiError
from forge.serve.http.telemetry import Telemetry

HEADER_TIMEOUT_S = 15.0
_MAX_HEADER_BYTES = 64 * 2**10
_MAX_REFUSED = 64
"""Refused connections that may still read why; more are closed without an answer."""
_REFUSED_S = 1.0
_RETRY_S = 5.0
_UPGRADE = (b"connection", b"upgrade", b"http2-settings")


class ConnectionLimit:
    """Counts the open connections of a server, in all and for each client."""

    def __init__(self, *, most: int, most_per_client: int, telemetry: Telemetry) -> None:
        self._most, self._most_per_client, self._telemetry = most, most_per_client, telemetry
        self._by_client: Counter[str] = Counter()
        self.num_refused = 0
        """That are not closed yet."""

    @property
    def num_open(self) -> int:
        return self._by_client.total()

    def enter(self, client: str) -> None:
        """Count a connection. Raises: ApiError with status 503 if there are too many."""
        num_open, of_client = self.num_open, self._by_client[client]
        if num_open >= self._most:
            self._telemetry.refused("all")
            problem = f"{num_open} connections are open, and no more than {self._most} may be"
        elif of_client >= self._most_per_client:
            self._telemetry.refused("client")
            problem = f"{of_client} connections of {client} are open, and a client may have {self._most_per_client}"
        else:
            self._by_client[client] += 1
            self._telemetry.connections(num_open + 1)
            return
        raise ApiError(problem, status=503, code="too_many_connections", retry_after_s=_RETRY_S)

    def leave(self, client: str) -> None:
        """Count the end of a connection that had entered."""
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]
        self._telemetry.connections(self.num_open)


def client_of(address: tuple[str, int] | None) -> str:
    """Return the address of a client; of IPv6 its network of 64 bits, all of which one client may use."""
    if address is None:
        return "this machine"
    try:
        found = ipaddress.ip_address(address[0].partition("%")[0])
    except ValueError:
        return address[0]
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


class LimitedConnection(HttpToolsProtocol):
    """Closes a connection beyond the limit, or whose request headers are not complete in time, or are too large.

    Bytes count until a part of a body or the end of the headers comes: also trailers behind a body in chunks, and
    the headers of a next request that is sent while the first is answered, are kept in memory.
    """

    _timer: asyncio.TimerHandle | None = None
    _num_header_bytes = 0
    _limit: ConnectionLimit
    _entered: str | None = None
    """The client, once this connection is counted."""

    @classmethod
    def within(cls, limit: ConnectionLimit) -> type[LimitedConnection]:
        """Return the class of the connections of one server."""
        return type(cls.__name__, (cls,), {"_limit": limit})

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        client = client_of(self.client)
        try:
            self._limit.enter(client)
        except ApiError as error:
            self._refuse(error)
            return
        self._entered = client
        self._await_headers()

    def _refuse(self, error: ApiError) -> None:
        """Answer before any request, and close once the client has closed, or in a second."""
        self._limit.num_refused += 1
        if self._limit.num_refused > _MAX_REFUSED:
            self.transport.abort()
            return
        body = json.dumps(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": len(body), "Connection": "close"}
        lines = [f"{name}: {value}\r\n" for name, value in (headers | error.headers()).items()]
        self.transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{''.join(lines)}\r\n".encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # Closed at once, what the client sends would reset the connection before it has read the answer.
        self._timer = asyncio.get_running_loop().call_later(_REFUSED_S, self.transport.close)

    def data_received(self, data: bytes) -> None:
        if self._entered is None:
            return
        is_between = self._is_between_requests()
        if self._timer is None and is_between:
            self._await_headers()
        self._num_header_bytes += len(data)
        self._parse(data)
        if self._num_header_bytes > _MAX_HEADER_BYTES and not self.transport.is_closing():
            if is_between:
                self.send_400_response("The request's headers are too large.")
            self._headers_complete()
            self.transport.close()

    def on_headers_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._headers_complete()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._entered is None:
            self._limit.num_refused -= 1
        else:
            self._limit.leave(self._entered)
        self._headers_complete()
        super().connection_lost(exc)

    def _parse(self, data: bytes) -> None:
        """Parse what came. Requests to upgrade, such as those of Java's client for HTTP/2, are parsed without that:
        the parser expects no body then. Source: RFC 9110, section 7.8.
        """
        self._unset_keepalive_if_required()
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._without_upgrade() + data[upgrade.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as the first
        except (httptools.HttpParserError, ValueError):
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _without_upgrade(self) -> bytes:
        """The head of the request that was parsed last. Raises: ValueError for CONNECT, which asks for a tunnel."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise ValueError("this server is no proxy")
        closes = any(name == b"connection" and b"close" in value.lower() for name, value in self.headers)
        kept = [(name, value) for name, value in self.headers if name not in _UPGRADE]
        kept += [(b"connection", b"close")] if closes else []
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        return b"\r\n".join([*lines, *(b"%s: %s" % pair for pair in kept), b"", b""])

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_headers(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(HEADER_TIMEOUT_S, self._time_out)

    def _headers_complete(self) -> None:
        self._num_header_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.transport is not None and not self.transport.is_closing():
            self.send_400_response("The request's headers did not arrive in time.")
