"""Simulated metadata services of three clouds on loopback, for everything that announces the end of a machine.

They use the real protocols and reject the requests that the real ones reject; they can fail, stop answering and be
restarted on the same port.
"""

from __future__ import annotations

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One HTTP answer."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Service(ABC):
    """One metadata service, serving inside a `with` block."""

    variable: ClassVar[str]
    fault: str = ""
    """`error`: answers with status 500; `silence`: accepts requests and does not answer."""
    clock: Callable[[], float] = time.time
    """The service's clock."""
    questions: list[str] = field(default_factory=list)
    num_refused: int = 0
    num_failed: int = 0
    port: int = 0
    address: str = "127.0.0.1"

    @abstractmethod
    def announce(self) -> None:
        """Announce the end of the machine in 30 s (AWS: 120 s)."""

    @abstractmethod
    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Answer:
        """The answer of the real service."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables that direct a watcher to this service."""
        return {"FORGE_CLOUD": type(self).__name__.lower(), self.variable: f"http://{self.address}:{self.port}"}

    def start(self) -> None:
        service = self

        class Handler(_Handler):
            def respond(self) -> None:
                service._respond(self)

        self._ended = threading.Event()
        self._server = ThreadingHTTPServer((self.address, self.port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse all further connections."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _respond(self, handler: _Handler) -> None:
        if self.fault == "silence":
            self.num_failed += 1
            self._ended.wait(10)
            return
        if self.fault == "error":
            self.num_failed += 1
            answer = Answer(status=500)
        else:
            asked = urlsplit(handler.path)
            query = {key: values[0] for key, values in parse_qs(asked.query).items()}
            answer = self.answer(handler.command, asked.path, query, dict(handler.headers))
            self.num_refused += answer.status in (400, 401, 403)
            self.questions.append(f"{handler.command} {handler.path}")
        handler.send(answer, date=self.clock())


class _Handler(BaseHTTPRequestHandler, ABC):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    @abstractmethod
    def respond(self) -> None: ...

    do_GET = do_PUT = lambda self: self.respond()

    def send(self, answer: Answer, *, date: float) -> None:
        try:
            self.send_response_only(answer.status)
            self.send_header("Date", formatdate(date, usegmt=True))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            body = answer.body.encode()
            if answer.headers.get("Transfer-Encoding") == "chunked":
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # the client has disconnected

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclass(kw_only=True)
class Aws(Service):
    """EC2's instance metadata service, version 2."""

    variable = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
    action: dict[str, str] | None = None
    rebalance: dict[str, str] | None = None
    tokens: list[str] = field(default_factory=list)
    """Accepted tokens."""
    num_tokens: int = 0
    """Issued so far."""

    def announce(self) -> None:
        self.action = {"action": "terminate", "time": iso(self.clock() + 120)}

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Answer:
        if path == "/latest/api/token":
            if method != "PUT" or not 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21600:
                return Answer(status=400)
            self.num_tokens += 1
            self.tokens.append(f"token-{self.num_tokens}")
            return Answer(body=self.tokens[-1])
        if headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return Answer(status=401)
        keys = {
            "/latest/meta-data/spot/instance-action": self.action,
            "/latest/meta-data/events/recommendations/rebalance": self.rebalance,
        }
        found = keys.get(path)
        return Answer(status=404) if found is None else Answer(body=json.dumps(found))


@dataclass(kw_only=True)
class Gcp(Service):
    """Compute Engine's metadata: a request may wait for a change."""

    variable = "GCE_METADATA_HOST"
    values: dict[str, str] = field(default_factory=lambda: {"preempted": "FALSE", "maintenance-event": "NONE"})
    longest_hold_s: float = 0.2
    """Upper bound of `timeout_sec`."""
    num_held: int = 0
    """Requests held open now."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def environment(self) -> dict[str, str]:
        return {"FORGE_CLOUD": "gcp", self.variable: f"127.0.0.1:{self.port}"}

    def announce(self) -> None:
        self.change("preempted", "TRUE")

    def change(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def stop(self) -> None:
        super().stop()
        with self.changed:
            self.changed.notify_all()

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Answer:
        if headers.get("Metadata-Flavor") != "Google":
            return Answer(status=403)
        key = path.removeprefix("/computeMetadata/v1/instance/")
        if key not in self.values:
            return Answer(status=404)
        with self.changed:
            if query.get("wait_for_change") == "true":
                # Without an etag a request waits for any change from now on.
                seen = query.get("last_etag", _etag(self.values[key]))
                self.num_held += 1
                self.changed.wait_for(
                    lambda: _etag(self.values[key]) != seen or self._ended.is_set(),
                    timeout=min(self.longest_hold_s, float(query.get("timeout_sec", "inf"))),
                )
                self.num_held -= 1
            value = self.values[key]
        return Answer(body=value, headers={"ETag": _etag(value), "Metadata-Flavor": "Google"})


@dataclass(kw_only=True)
class Azure(Service):
    """Azure's scheduled events and the machine's name; lists are sent with chunked encoding."""

    variable = "AZURE_METADATA_ENDPOINT"
    machine: str = "spot_3"
    events: list[dict[str, Any]] = field(default_factory=list)

    def announce(self) -> None:
        self.schedule()

    def schedule(self, *, kind: str = "Preempt", machine: str = "spot_3", not_before: str | None = None) -> None:
        if not_before is None:
            not_before = formatdate(self.clock() + 30, usegmt=True)
        self.events.append(
            {
                "EventId": f"event-{len(self.events) + 1}",
                "EventStatus": "Scheduled" if not_before else "Started",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": ["spot_0", machine],
                "NotBefore": not_before,
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Answer:
        if headers.get("Metadata") != "true" or "api-version" not in query:
            return Answer(status=400)
        if path == "/metadata/instance/compute/name" and query.get("format") == "text":
            return Answer(body=self.machine)
        if path == "/metadata/scheduledevents":
            body = json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events})
            return Answer(body=body, headers={"Transfer-Encoding": "chunked"})
        return Answer(status=404)


class Redirect(Service):
    """A service that redirects every request."""

    variable = ""

    def __init__(self, target: str, *, status: int) -> None:
        super().__init__()
        self.target, self.status = target, status

    def announce(self) -> None:
        raise AssertionError("it announces nothing")

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Answer:
        return Answer(status=self.status, headers={"Location": self.target})


def iso(moment: float) -> str:
    """Format a time as AWS does."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _etag(value: str) -> str:
    return f"{hash(value) & 0xFFFFFFFFFFFF:x}"
