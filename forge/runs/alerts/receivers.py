"""The receivers that `alerts:` can name: a webhook, a command, W&B.

Each sends one message and returns, or raises; how often it is tried, `forge.runs.alerts.delivery` decides. Nothing
that a receiver answers is kept but its status.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from forge.config.alerts import AlertKind, is_loopback, webhook_problem
from forge.process import ending, first_line
from forge.redact import is_credential
from forge.runs.trackers.wandb_tracker import WandbTracker

_REQUEST_TIMEOUT_S = 15.0
_COMMAND_TIMEOUT_S = 30.0
_WANDB_TIMEOUT_S = 30.0
_TRY_AGAIN = (408, 425, 429)
"""Statuses below 500 after which a request may succeed later. Source: RFC 9110, RFC 6585, RFC 8470."""
_LEVELS: Mapping[str, str] = {"finished": "INFO", "nan": "ERROR", "failed": "ERROR"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertMessage:
    """What a receiver gets, without secrets."""

    run_id: str
    kind: AlertKind
    text: str
    step: int
    time: float
    """When the newest alert of the message was recorded, in seconds since the epoch."""
    count: int = 1
    """Alerts of the kind that the message is about."""


class ReceiverRefusedError(Exception):
    """A receiver will not take the message, however often it is sent."""


class AlertReceiver(Protocol):
    """Sends messages to one place; used by one thread."""

    name: ClassVar[str]

    def send(self, message: AlertMessage) -> None:
        """Send a message, within a time limit.

        Raises: ReceiverRefusedError if trying again is of no use; any other exception otherwise.
        """


class Webhook:
    """Posts `{"text": ...}`. Redirects are not followed, bodies are not read, `.netrc` is not used."""

    name: ClassVar[str] = "webhook"

    def __init__(self, url: str, *, timeout_s: float = _REQUEST_TIMEOUT_S) -> None:
        self._url, self._timeout_s = url, timeout_s

    def send(self, message: AlertMessage) -> None:
        if "${" in self._url:
            raise ReceiverRefusedError(
                "the environment variable of its address is not set where the run was started"
            )
        if problem := webhook_problem(self._url):
            raise ReceiverRefusedError(f"its address {problem}")
        host = urlsplit(self._url).hostname or ""
        try:
            status = asyncio.run(self._post({"text": slack_text(message)}, host=host))
        except TimeoutError:
            raise TimeoutError(f"{host} did not answer within {self._timeout_s:g} s") from None
        except Exception as error:  # aiohttp's classes, and some of asyncio; the address is a secret
            reason = first_line(error).replace(self._url, "***")
            raise OSError(f"{host} cannot be reached: {reason}") from None
        if 300 <= status < 400:
            raise ReceiverRefusedError(f"{host} answered with a redirect ({status}), which is not followed")
        if 400 <= status < 500 and status not in _TRY_AGAIN:
            raise ReceiverRefusedError(f"{host} answered with status {status}")
        if not 200 <= status < 300:
            raise OSError(f"{host} answered with status {status}")

    async def _post(self, body: Mapping[str, str], *, host: str) -> int:
        import aiohttp

        is_direct = is_loopback(host) or proxy_bypass(host)
        proxy = None if is_direct else getproxies().get(urlsplit(self._url).scheme)
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)  # of everything, however slowly bytes arrive
        async with (
            aiohttp.ClientSession(trust_env=False, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.post(self._url, json=body, proxy=proxy, allow_redirects=False) as response,
        ):
            return response.status


class Command:
    """Starts a program with the message as JSON on its stdin; its output is not read."""

    name: ClassVar[str] = "command"

    def __init__(self, command: tuple[str, ...], *, folder: Path, timeout_s: float = _COMMAND_TIMEOUT_S) -> None:
        self._command, self._folder, self._timeout_s = command, folder, timeout_s

    def send(self, message: AlertMessage) -> None:
        program = Path(self._command[0]).name
        environment = {name: value for name, value in os.environ.items() if not is_credential(name)}
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self._folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise ReceiverRefusedError(f"{program} cannot be started: {error.strerror}") from None
        try:
            process.communicate((json.dumps(asdict(message)) + "\n").encode(), timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{program} was killed after {self._timeout_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind too
            process.wait()
        if process.returncode:
            raise OSError(f"{program} ended with {ending(process.returncode)}")


class WandbAlerts:
    """Sends W&B alerts from the run that the tracker writes.

    Args:
        call: lets the tracker's thread call a function with it.
    """

    name: ClassVar[str] = "W&B"

    def __init__(self, call: Callable[[Callable[[WandbTracker], None]], Future[None]]) -> None:
        self._call = call

    def send(self, message: AlertMessage) -> None:
        title, level = message.kind.replace("_", " "), _LEVELS.get(message.kind, "WARN")
        done = self._call(lambda tracker: tracker.alert(title=title, text=message.text, level=level))
        try:
            done.result(timeout=_WANDB_TIMEOUT_S)
        except TimeoutError:
            done.cancel()
            raise TimeoutError(f"W&B did not take it within {_WANDB_TIMEOUT_S:g} s") from None


def slack_text(message: AlertMessage) -> str:
    """Return the text with Slack's three control characters escaped, so that no name in it addresses a channel.

    Source: Slack API documentation, "Formatting text for app surfaces: escaping text".
    """
    return message.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
