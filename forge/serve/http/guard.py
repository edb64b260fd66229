"""What every request passes before a route sees it: host, key, size and time limits, request id, access log.

It is a plain ASGI middleware: a body is read here, within its limits, so that no route can be kept waiting by a
slow client or be sent more than it can hold.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers

from forge.errors import ArgumentError, printable
from forge.serve.http.api_keys import ApiKey, KeyRing
from forge.serve.http.errors import ApiError
from forge.serve.http.settings import SAFETY_HEADERS, ServerSettings, is_loopback, named_host
from forge.serve.http.telemetry import Telemetry

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_log = logging.getLogger("forge.serve.access")
_OPEN_PATHS = ("/", "/health")
_OPEN_PREFIX = "/page/"
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_DISCARDED_BYTES = 64 * 2**20
"""Of a body that is too large: a client that is still sending would not see the answer."""


class ClientGoneError(Exception):
    """The client closed its connection, or does not read its answer."""


class Guard:
    """Lets requests through to `app`, or answers them."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        settings: ServerSettings,
        keys: KeyRing,
        telemetry: Telemetry,
    ) -> None:
        self._app, self._settings, self._keys, self._telemetry = app, settings, keys, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        entry: dict[str, Any] = {"id": given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"}
        scope.setdefault("state", {})["entry"] = entry
        began, status = time.monotonic(), 0

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", entry["id"].encode()), *SAFETY_HEADERS]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            try:
                async with asyncio.timeout(self._settings.write_timeout_s):
                    await send(message)
            except TimeoutError:
                raise ClientGoneError("the client does not read its answer") from None

        try:
            scope["state"]["key"] = self._admit(scope, headers)
            most = 0 if _is_open(scope["path"]) else self._settings.max_body_bytes
            body = await self._read_body(receive, most=most)
            await self._app(scope, _replay(body, receive), guarded_send)
        except ApiError as error:
            await error.response()(scope, receive, guarded_send)
        except ClientGoneError:
            status = status or 499
        except Exception:  # the answer was sent by the handler of the application
            logging.getLogger("forge.serve").exception("%s failed", entry["id"])
        finally:
            self._record(scope, entry, status=status, seconds=time.monotonic() - began)

    def _admit(self, scope: Scope, headers: Headers) -> ApiKey | None:
        """Check who asks. Returns: the key; None where none is needed. Raises: ApiError."""
        if self._keys.is_open and self._settings.is_loopback:
            self._require_own_host(headers)
        if _is_open(scope["path"]) or self._keys.is_open:
            return None
        try:
            self._keys.refresh()
        except ArgumentError as error:
            logging.getLogger("forge.serve").error("%s; the former keys stay in force", error)
        key = self._keys.find(headers.get("authorization"))
        if key is None:
            message = "send an API key, as in Authorization: Bearer KEY"
            if "authorization" in headers:
                message = "the API key is not known to this server"
            raise ApiError(message, status=401, code="invalid_api_key")
        return key

    def _require_own_host(self, headers: Headers) -> None:
        """Refuse what a web page elsewhere makes this machine's browser send to a server without keys."""
        for name in ("host", "origin"):
            value = headers.get(name)
            if value is None:
                continue
            if not is_loopback(named_host(value)):
                raise ApiError(
                    f"this server answers requests to this machine only, and the {name.title()} header names "
                    f"{printable(value, limit=80)}",
                    status=403,
                    code="foreign_host",
                )

    async def _read_body(self, receive: Receive, *, most: int) -> bytes:
        """Read a request's body. Raises: ApiError if it is too large or too slow; ClientGoneError."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError("the client closed the connection before its request was complete")
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    else:
                        parts.clear()
                    if not message.get("more_body") or size > _MAX_DISCARDED_BYTES:
                        break
        except TimeoutError:
            raise ApiError(
                f"the body did not arrive within {self._settings.body_timeout_s:g} s",
                status=408,
                code="slow_request",
            ) from None
        if size > most:
            raise ApiError(
                f"the body has {size} bytes or more, and at most {most} are accepted",
                status=413,
                code="body_too_large",
            )
        return b"".join(parts)

    def _record(self, scope: Scope, entry: dict[str, Any], *, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._telemetry.answered(route=route, status=status)
        if route not in ("/health", "/metrics"):
            key = scope["state"].get("key")
            record = entry | {"key": key.name if key else None, "route": route, "status": status}
            _log.info(json.dumps(record | {"seconds": round(seconds, 4)}))


def _is_open(path: str) -> bool:
    """Whether a path needs no key. It takes no body either: any client could fill the memory with them."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read before, then whatever comes after it."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
