"""The servers of this machine, as their clients see them: start one, list them, stop one, change its weights.

A server has a folder in forge's state folder: its options, its state once a second, its logs, and a lock that its
process holds as long as it lives.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, ClusterError, RunError, printable
from forge.foreign import parse_object, read_file
from forge.fs import make_private, state_home, write_atomic
from forge.runs.lock import driver_pid
from forge.runs.reader import error_named
from forge.runs.remote_ref import REMOTE
from forge.runtime.driver_process import SERVER_MODULE, LocalRun, find_local_run, start_holder
from forge.serve.http.api_keys import KEYS_VARIABLE
from forge.serve.http.settings import EXPORTS, SETTINGS, STATUS, UPDATE, ServerSettings, settings_to_json

API_KEYS = KEYS_VARIABLE
"""The environment variable with keys, which a server gets."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,47}")
_POLL_S = 0.1
_END_S = 30.0
"""How long a server that failed may take to shut Ray down."""
_MAX_STATUS_BYTES = 2**20
_NOT_READY = ("failed", "stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """The state of one server."""

    name: str
    folder: Path
    is_alive: bool
    record: Mapping[str, Any]
    """What its process wrote last."""

    @property
    def state(self) -> str:
        """`starting`, `ready`, `draining`, `stopped`, `failed`, or `died` if its process ended without a word."""
        state = str(self.record.get("state", "starting"))
        return state if self.is_alive or state in _NOT_READY else "died"

    @property
    def message(self) -> str:
        if self.state == "died":
            return "its process was killed, or the machine has restarted"
        return str(self.record.get("message", ""))


Look = Callable[[str | None], ServerStatus]
"""Finds the state of a server by its name, as `find_server` does."""


def server_folder(name: str) -> Path:
    """The folder of a server. Raises: ArgumentError if that is not a name."""
    if not _NAME.fullmatch(name):
        raise ArgumentError(
            f"'{printable(name, limit=80)}' is not a server's name: lower-case letters, digits, _ and -"
        )
    return state_home() / "servers" / name


def list_servers() -> list[ServerStatus]:
    """The servers that were started on this machine and not removed, by name."""
    root = state_home() / "servers"
    return [server_status(folder) for folder in sorted(root.glob("*")) if _NAME.fullmatch(folder.name)]


def find_server(name: str | None) -> ServerStatus:
    """The server of this name; without one, the only server that runs.

    Raises: ArgumentError listing the servers.
    """
    servers = list_servers()
    if name is None:
        return choose_server(servers)
    folder = server_folder(name)
    if not folder.is_dir():
        raise ArgumentError(f"there is no server '{name}'; {f'known: {_names(servers)}' if servers else _NONE}")
    return server_status(folder)


def choose_server(servers: list[ServerStatus]) -> ServerStatus:
    """The only server that runs, or else the only one. Raises: ArgumentError listing them."""
    alive = [server for server in servers if server.is_alive] or servers
    if len(alive) == 1:
        return alive[0]
    if not alive:
        raise ArgumentError(_NONE)
    problem = f"{len(alive)} servers run" if alive[0].is_alive else "no server runs, and several have ended"
    raise ArgumentError(f"{problem}; name one: {_names(alive)}")


def start_server(settings: ServerSettings) -> ServerStatus:
    """Start a server in its own session; return once its process holds the lock of its folder.

    Raises: ArgumentError if one of its name runs; RunError if its process ended at once.
    """
    folder = prepare_server(settings)
    process = start_holder(SERVER_MODULE, folder=folder, log="server.log")
    status = server_status(folder)
    if process.poll() is not None and status.state not in _NOT_READY:
        raise RunError(f"the server ended at once; its log is {folder / 'logs' / 'server.log'}")
    return status


def prepare_server(settings: ServerSettings, *, files: Mapping[str, str] | None = None) -> Path:
    """Write the folder of a server that is about to start.

    Args:
        files: contents of files that the settings name, by the name of the setting: `keys_file`, `tls_key`.

    Returns: the folder.
    Raises: ArgumentError if one of its name runs, or packages are missing.
    """
    _require_packages()
    folder = server_folder(settings.name)
    if driver_pid(folder) is not None:
        raise ArgumentError(
            f"a server '{settings.name}' runs already; stop it with forge serve stop {settings.name}, give it "
            f"other weights with forge serve update {settings.name}, or choose another --name"
        )
    make_private(folder)
    for left in (STATUS, UPDATE, REMOTE):
        (folder / left).unlink(missing_ok=True)
    for left in ("logs", EXPORTS):
        shutil.rmtree(folder / left, ignore_errors=True)
    paths: dict[str, Any] = {}
    for name, text in (files or {}).items():
        paths[name] = str(folder / f"{name}.txt")
        write_atomic(folder / f"{name}.txt", text, mode=0o600)
    write_atomic(folder / SETTINGS, settings_to_json(replace(settings, **paths)), mode=0o600)
    return folder


def _require_packages() -> None:
    """Raises: ArgumentError if the packages of the extra `serve` are missing."""
    missing = [name for name in ("fastapi", "uvicorn", "httptools", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ArgumentError(f"forge serve needs {', '.join(missing)}: pip install 'forge-train[serve]'")


def await_ready(name: str, *, on_message: Callable[[str], None], look: Look | None = None) -> ServerStatus:
    """Wait until a server is ready.

    Args:
        look: finds the state of the server; by default of one on this machine.

    Raises: the error with which it failed.
    """
    for status in _changes(name, look=look):
        if status.state == "ready":
            return status
        if status.state in (*_NOT_READY, "died"):
            kind = str(status.record.get("error", "RunError"))
            reason = status.message or "its process ended without a reason"
            _await_end(status.folder)
            raise error_named(kind, message=f"{reason}; the log is {status.folder / 'logs' / 'server.log'}")
        if status.message:
            on_message(status.message)
    raise AssertionError("the states of a server do not end")


def _await_end(folder: Path) -> None:
    """Wait until the process of a server that failed has ended, so that the next command can start another."""
    deadline = time.monotonic() + _END_S
    while driver_pid(folder) is not None and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def update_server(
    name: str,
    changes: Mapping[str, Any],
    *,
    on_message: Callable[[str], None],
    look: Look | None = None,
    send: Callable[[Mapping[str, Any]], None] | None = None,
) -> str:
    """Give a server other weights, and wait until they serve. Returns: what happened.

    Args:
        look, send: find its state and send it the request, if it is on another machine.

    Raises: ArgumentError if it does not run; RunError if the new weights cannot be served, and the former stay.
    """
    status = (look or find_server)(name)
    if status.state != "ready":
        raise ArgumentError(
            f"the server '{name}' is {status.state}, and only one that is ready takes other weights"
        )
    number, former = secrets.token_hex(8), (status.record.get("update") or {}).get("id")
    request = {**changes, "id": number}
    if send is None:
        write_update(status.folder, request)
    else:
        send(request)
    on_message("loading the new weights beside those in use")
    for status in _changes(name, look=look):
        update = status.record.get("update") or {}
        if status.state != "ready":
            raise ClusterError(f"the server '{name}' is {status.state}: {status.message}")
        if update.get("id") not in (number, former):
            raise RunError("another update took the place of this one; see forge serve status")
        if update.get("id") == number and update.get("state") == "failed":
            raise RunError(f"the former weights stay in use: {update.get('message')}")
        if update.get("id") == number and update.get("state") == "done":
            return str(update.get("message"))
    raise AssertionError("the states of a server do not end")


def write_update(folder: Path, request: Mapping[str, Any]) -> None:
    """Ask the server of a folder for other weights."""
    write_atomic(folder / UPDATE, json.dumps(dict(request)) + "\n", mode=0o600)


def server_process(name: str) -> LocalRun | None:
    """The process of a server, to stop it and to wait for it; None if it has none."""
    return find_local_run(server_folder(name))


def _changes(name: str, *, look: Look | None) -> Iterator[ServerStatus]:
    last: object = None
    while True:
        status = (look or find_server)(name)
        if (status.state, status.record) != last:
            last = (status.state, status.record)
            yield status
        time.sleep(_POLL_S)


def server_status(folder: Path) -> ServerStatus:
    is_alive = driver_pid(folder) is not None
    try:
        record = parse_object(read_file(folder / STATUS, max_bytes=_MAX_STATUS_BYTES))
    except (OSError, ValueError):
        record = {}
    return ServerStatus(name=folder.name, folder=folder, is_alive=is_alive, record=record)


def _names(servers: list[ServerStatus]) -> str:
    return ", ".join(server.name for server in servers)


_NONE = "no server was started on this machine: forge serve RUN"
