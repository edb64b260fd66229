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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, ClusterError, RunError, printable
from forge.foreign import parse_object, read_file
from forge.fs import make_private, state_home, write_atomic
from forge.runs.reader import driver_pid, error_named
from forge.runtime.driver_process import LocalRun, find_local_run, start_holder
from forge.serve.http.settings import EXPORTS, SETTINGS, STATUS, UPDATE, ServerSettings, settings_to_json

SERVER_MODULE = "forge.runtime.serve_process"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,47}")
_POLL_S = 0.1
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
        return str(self.record.get("message", ""))


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
    return [_status(folder) for folder in sorted(root.glob("*")) if _NAME.fullmatch(folder.name)]


def find_server(name: str | None) -> ServerStatus:
    """The server of this name; without one, the only server that runs.

    Raises: ArgumentError listing the servers.
    """
    servers = list_servers()
    if name is None:
        alive = [server for server in servers if server.is_alive] or servers
        if len(alive) == 1:
            return alive[0]
        raise ArgumentError(f"{len(alive)} servers run; name one: {_names(alive)}" if alive else _NONE)
    folder = server_folder(name)
    if not folder.is_dir():
        raise ArgumentError(f"there is no server '{name}'; {f'known: {_names(servers)}' if servers else _NONE}")
    return _status(folder)


def start_server(settings: ServerSettings) -> ServerStatus:
    """Start a server in its own session; return once its process holds the lock of its folder.

    Raises: ArgumentError if one of its name runs; RunError if its process ended at once.
    """
    _require_packages()
    folder = server_folder(settings.name)
    if driver_pid(folder) is not None:
        raise ArgumentError(
            f"a server '{settings.name}' runs already; stop it with forge serve stop {settings.name}, give it "
            f"other weights with forge serve update {settings.name}, or choose another --name"
        )
    make_private(folder)
    for left in (STATUS, UPDATE):
        (folder / left).unlink(missing_ok=True)
    for left in ("logs", EXPORTS):
        shutil.rmtree(folder / left, ignore_errors=True)
    write_atomic(folder / SETTINGS, settings_to_json(settings), mode=0o600)
    process = start_holder(SERVER_MODULE, folder=folder, log="server.log")
    status = _status(folder)
    if process.poll() is not None and status.state not in _NOT_READY:
        raise RunError(f"the server ended at once; its log is {folder / 'logs' / 'server.log'}")
    return status


def _require_packages() -> None:
    """Raises: ArgumentError if the packages of the extra `serve` are missing."""
    missing = [name for name in ("fastapi", "uvicorn", "httptools", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ArgumentError(f"forge serve needs {', '.join(missing)}: pip install 'forge-train[serve]'")


def await_ready(name: str, *, on_message: Callable[[str], None]) -> ServerStatus:
    """Wait until a server is ready. Raises: the error with which it failed."""
    for status in _changes(name):
        if status.state == "ready":
            return status
        if status.state in (*_NOT_READY, "died"):
            kind = str(status.record.get("error", "RunError"))
            reason = status.message or "its process ended without a reason"
            raise error_named(kind, message=f"{reason}; the log is {status.folder / 'logs' / 'server.log'}")
        if status.message:
            on_message(status.message)
    raise AssertionError("the states of a server do not end")


def update_server(name: str, changes: Mapping[str, Any], *, on_message: Callable[[str], None]) -> str:
    """Give a server other weights, and wait until they serve. Returns: what happened.

    Raises: ArgumentError if it does not run; RunError if the new weights cannot be served, and the former stay.
    """
    status = find_server(name)
    if status.state != "ready":
        raise ArgumentError(
            f"the server '{name}' is {status.state}, and only one that is ready takes other weights"
        )
    number = secrets.token_hex(8)
    write_atomic(status.folder / UPDATE, json.dumps({**changes, "id": number}) + "\n", mode=0o600)
    on_message("loading the new weights beside those in use")
    for status in _changes(name):
        update = status.record.get("update") or {}
        if status.state != "ready":
            raise ClusterError(f"the server '{name}' is {status.state}: {status.message}")
        if update.get("id") == number and update.get("state") == "failed":
            raise RunError(f"the former weights stay in use: {update.get('message')}")
        if update.get("id") == number and update.get("state") == "done":
            return str(update.get("message"))
    raise AssertionError("the states of a server do not end")


def server_process(name: str) -> LocalRun | None:
    """The process of a server, to stop it and to wait for it; None if it has none."""
    return find_local_run(server_folder(name))


def _changes(name: str) -> Iterator[ServerStatus]:
    last: object = None
    while True:
        status = find_server(name)
        if (status.state, status.record) != last:
            last = (status.state, status.record)
            yield status
        time.sleep(_POLL_S)


def _status(folder: Path) -> ServerStatus:
    is_alive = driver_pid(folder) is not None
    try:
        record = parse_object(read_file(folder / STATUS, max_bytes=_MAX_STATUS_BYTES))
    except (OSError, ValueError):
        record = {}
    return ServerStatus(name=folder.name, folder=folder, is_alive=is_alive, record=record)


def _names(servers: list[ServerStatus]) -> str:
    return ", ".join(server.name for server in servers)


_NONE = "no server was started on this machine: forge serve RUN"
