"""Who may use the page: host names, the token, and where a request that changes something comes from.

A server for this machine alone needs no token; one that other machines reach always has one. A browser shows the
token once, and then sends a cookie that is worth nothing to another process. Every answer has the headers that keep
it out of other pages.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from forge.errors import ArgumentError, printable
from forge.serve.http.api_keys import digest_of
from forge.serve.http.settings import SAFETY_HEADERS, is_host_name, is_loopback, named_host

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

TOKEN_VARIABLE = "FORGE_UI_TOKEN"
CSRF_HEADER = "x-forge-csrf"
LOGIN = "/login"
_OPEN_PREFIX = "/static/"
_HEADERS = [
    *(header for header in SAFETY_HEADERS if header[0] != b"referrer-policy"),
    (b"referrer-policy", b"same-origin"),  # with no-referrer a browser sends a form with `Origin: null`
    (b"cross-origin-resource-policy", b"same-origin"),
]
_MIN_CHARS = 20
"""A shorter token could be guessed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a request is checked against."""

    host: str
    """The address that the server listens on."""
    port: int
    token_digest: str | None = field(default=None, repr=False)
    """None: no token is needed."""
    more_hosts: frozenset[str] = frozenset()
    """Other names that this server is reached by, in lower case."""
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    """Value of the cookie of a browser that has shown the token."""
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    """Stands in the page; a request that changes something sends it, which a page elsewhere cannot read."""

    @property
    def cookie(self) -> str:
        """Its name: cookies are shared by all ports of a host."""
        return f"forge-ui-{self.port}"

    def knows_host(self, header: str | None) -> bool:
        """Whether a `Host` header names this server, and not a name that someone has led to its address.

        An address in digits cannot be led elsewhere by DNS.
        """
        host = named_host(header or "").lower().rstrip(".")
        if host in self.more_hosts or is_loopback(host):
            return True
        if is_loopback(self.host):
            return False
        return host in (socket.gethostname().lower(), socket.getfqdn().lower()) or _is_address(host)

    def has_token(self, presented: str) -> bool:
        """Compare a token in constant time."""
        return self.token_digest is not None and hmac.compare_digest(digest_of(presented), self.token_digest)

    def has_bearer(self, headers: Headers) -> bool:
        """Whether a request has the token in its `Authorization` header."""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self.has_token(value.strip())

    def has_session(self, headers: Headers) -> bool:
        """Whether a request has the cookie of a browser that has shown the token."""
        given = cookie_parser(headers.get("cookie", "")).get(self.cookie, "")
        return hmac.compare_digest(given.encode(errors="replace"), self.session.encode())


def token_access(host: str, port: int, *, token: str | None, more_hosts: Iterable[str] = ()) -> Access:
    """Return the access of a server.

    Args:
        token: None: there is none.

    Raises: ArgumentError if the token could be guessed, or is missing where other machines reach the server, or if
        another name is none.
    """
    if token is not None and len(token) < _MIN_CHARS:
        raise ArgumentError(
            f"{TOKEN_VARIABLE} has {len(token)} characters, and could be guessed; it needs {_MIN_CHARS} or more"
        )
    if token is None and not is_loopback(host):
        raise ArgumentError(f"a server at {host} is reached by other machines, and needs a token")
    names = frozenset(map(str.lower, more_hosts))
    if wrong := sorted(name for name in names if not is_host_name(name)):
        named = printable(wrong[0], limit=80)
        raise ArgumentError(f"--allow-host '{named}' is no name of a host: leave out scheme, port and path")
    digest = None if token is None else digest_of(token)
    return Access(host=host, port=port, token_digest=digest, more_hosts=names)


class AccessGuard:
    """Lets requests through to `app`, or answers them."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], *, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_safely(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        refusal = self._refusal(scope, Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_safely)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the answer to a request that is not let through; None if it is."""
        access, host = self._access, headers.get("host")
        if not access.knows_host(host):
            named = printable(host or "", limit=80)
            return PlainTextResponse(
                f"This server is not known as '{named}'. If that is its name, start it with --allow-host.\n", 403
            )
        path, has_bearer = scope["path"], access.has_bearer(headers)
        is_open = path == LOGIN or path.startswith(_OPEN_PREFIX) or access.token_digest is None
        if not is_open and not has_bearer and not access.has_session(headers):
            if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
                return RedirectResponse(LOGIN, 303)
            return PlainTextResponse("Send the token, as in Authorization: Bearer TOKEN.\n", 401)
        if scope["method"] in ("GET", "HEAD") or has_bearer:
            return None
        return self._foreign(path, headers)

    def _foreign(self, path: str, headers: Headers) -> Response | None:
        """Refuse a request that changes something unless a page of this server has sent it."""
        origin = headers.get("origin", "")
        is_own = origin.partition("://")[2].lower() == headers.get("host", "").lower()
        is_own = is_own and headers.get("sec-fetch-site", "same-origin") == "same-origin"
        given = headers.get(CSRF_HEADER, "").encode(errors="replace")
        if is_own and (path == LOGIN or hmac.compare_digest(given, self._access.csrf.encode())):
            return None
        return PlainTextResponse("Only a page of this server may do that; load the page again.\n", 403)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
