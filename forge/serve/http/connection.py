"""A connection that bounds the time and the size of request headers, which uvicorn's own does not, and that answers
requests for another protocol in HTTP/1.1, with their bodies.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT_S = 15.0
_MAX_HEADER_BYTES = 64 * 2**10
_UPGRADE = (b"connection", b"upgrade", b"http2-settings")


class LimitedConnection(HttpToolsProtocol):
    """Closes a connection whose request headers are not complete in time, or are too large.

    Bytes count until a part of a body or the end of the headers comes: also trailers behind a body in chunks, and
    the headers of a next request that is sent while the first is answered, are kept in memory.
    """

    _timer: asyncio.TimerHandle | None = None
    _num_header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
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
