"""Servers on clusters of other machines: start one on the head, and reach it from here as one of this machine.

Such a server has a folder here too, whose `remote.json` names the cluster and the folder on its head; everything
else is asked for there. It is independent of this machine once it is started.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge.cluster.base import Cluster
from forge.cluster.local.ray_cluster import NAME, find_local
from forge.cluster.registry import find_cluster, find_known
from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.fs import make_private
from forge.remote.mirror import ask, job_client, job_name, submit_job
from forge.remote.models import place_model
from forge.remote.submit import preflight
from forge.runs.logs import follow_log, last_lines, log_size
from forge.runs.remote_ref import RemoteRef, read_remote_ref, write_remote_ref
from forge.runtime.servers import (
    API_KEYS,
    ServerStatus,
    choose_server,
    find_server,
    list_servers,
    server_folder,
    server_process,
    start_server,
    update_server,
)
from forge.serve.http.settings import ServerSettings, settings_to_json

_POLL_S = 1.0
_START_TIMEOUT_S = 90.0
_FILES = ("keys_file", "tls_cert", "tls_key")
"""Settings that name files of this machine, whose contents are sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteServer:
    """A server on a cluster, to stop it and to wait for it."""

    name: str
    cluster: Cluster
    ref: RemoteRef

    def request_stop(self) -> None:
        """Ask it to finish its running requests and end; the second call ends it at once."""
        ask(self.cluster, "stop", self.ref.folder)

    def wait(self) -> None:
        """Return once it has ended."""
        while find_any_server(self.name).is_alive:
            time.sleep(_POLL_S)

    def forward(self, port: int, *, local: int) -> AbstractContextManager[int]:
        """Open a tunnel to a port of the head's loopback."""
        return self.cluster.forward(port, local=local)


def remote_server(name: str) -> RemoteServer | None:
    """The server of this name if it is on another machine. Raises: ArgumentError if its cluster is not known."""
    ref = read_remote_ref(server_folder(name))
    return None if ref is None else RemoteServer(name=name, cluster=find_known(ref.cluster), ref=ref)


def list_any_servers() -> list[ServerStatus]:
    """The servers that were started from this machine, on it or on clusters."""
    return [_asked(status) for status in list_servers()]


def find_any_server(name: str | None) -> ServerStatus:
    """As `find_server`, also of servers on clusters."""
    return choose_server(list_any_servers()) if name is None else _asked(find_server(name))


def start_any_server(settings: ServerSettings, *, cluster: str | None, on_message: Callable[[str], None]) -> None:
    """Start a server on this machine, or on a cluster by its name or file.

    Raises: ArgumentError if one of its name runs on a cluster; what `start_server` and `start_on_cluster` raise.
    """
    ref = read_remote_ref(server_folder(settings.name))
    if ref is not None and find_any_server(settings.name).is_alive:
        raise ArgumentError(
            f"a server '{settings.name}' runs on '{ref.cluster}'; stop it with forge serve stop {settings.name}, "
            "or choose another --name"
        )
    found = None if cluster is None else find_cluster(cluster)
    if found is None or found.shares_files:
        start_server(settings)
    else:
        start_on_cluster(settings, cluster=found, on_message=on_message)


def start_on_cluster(settings: ServerSettings, *, cluster: Cluster, on_message: Callable[[str], None]) -> None:
    """Start a server on the head of a cluster, in the background.

    Args:
        settings: with folders and files of this machine.

    Raises: ArgumentError if one of its name runs there; what `place_model` raises; ClusterError if it does not
        start.
    """
    target = preflight(cluster)
    placed = place_model(target, Path(settings.source), step=settings.step, on_message=on_message)
    environment, adapters = dict(placed.environment), []
    for name, source in settings.named_adapters().items():
        other = place_model(target, Path(source), on_message=on_message)
        environment |= other.environment
        adapters.append(f"{name}={other.folder}")
    there = replace(settings, source=placed.folder, adapters=tuple(adapters))
    paths = {name: getattr(settings, name) for name in _FILES}
    files = {name: _read(path) for name, path in paths.items() if path is not None}
    request = {"settings": json.loads(settings_to_json(there)), "files": files}
    remote_folder: str = ask(cluster, "serve", stdin=json.dumps(request).encode())
    environment |= {API_KEYS: os.environ[API_KEYS]} if os.environ.get(API_KEYS) else {}
    ask(cluster, "stash", settings.name, stdin=json.dumps(environment).encode())
    folder = server_folder(settings.name)
    make_private(folder)
    ref = RemoteRef(cluster=cluster.name, folder=remote_folder, job=job_name(folder), events=0, steps=0)
    write_remote_ref(folder, ref)
    with job_client(cluster) as client:
        submit_job(client, ref, verb="launch", python=target.python)
        _await_launch(client, ref)


def update_any_server(
    status: ServerStatus, changes: Mapping[str, Any], *, on_message: Callable[[str], None]
) -> str:
    """As `update_server`, also of servers on clusters, which get the weights first."""
    remote = remote_server(status.name)
    if remote is None:
        return update_server(status.name, changes, on_message=on_message)
    target = preflight(remote.cluster)
    placed = place_model(target, Path(changes["source"]), step=changes.get("step"), on_message=on_message)
    there: dict[str, Any] = {"source": placed.folder}
    if "adapters" in changes:
        given = (text.partition("=")[::2] for text in changes["adapters"])
        there["adapters"] = [
            f"{name}={place_model(target, Path(source), on_message=on_message).folder}" for name, source in given
        ]
    return update_server(
        status.name,
        {**changes, **there},
        on_message=on_message,
        look=find_any_server,
        send=lambda request: ask(remote.cluster, "update", remote.ref.folder, stdin=json.dumps(request).encode()),
    )


def server_lines(status: ServerStatus, *, name: str, lines: int) -> str:
    """The last lines of a server's log. Raises: ArgumentError listing its logs; ClusterError."""
    remote = remote_server(status.name)
    if remote is None:
        return last_lines(status.folder, name=name, lines=lines)
    text: str = ask(remote.cluster, "log", remote.ref.folder, name, str(lines))
    return text


def follow_server(status: ServerStatus, *, name: str = "server") -> Iterator[str]:
    """Yield what is appended to a server's log from now on, until it ends."""
    remote = remote_server(status.name)
    if remote is not None:
        _, offset = ask(remote.cluster, "more", remote.ref.folder, name, "-1")
        return _remote_log(remote, name=name, offset=offset)
    size = log_size(status.folder, name=name)
    return follow_log(status.folder, name=name, offset=size, goes_on=lambda: find_server(status.name).is_alive)


def _remote_log(remote: RemoteServer, *, name: str, offset: int) -> Iterator[str]:
    while True:
        is_last = not find_any_server(remote.name).is_alive  # before reading, so that the last lines are read too
        text, offset = ask(remote.cluster, "more", remote.ref.folder, name, str(offset))
        if text:
            yield text
        if is_last:
            return
        time.sleep(_POLL_S)


def stop_servers_of(cluster: Cluster, *, on_message: Callable[[str], None]) -> None:
    """Stop the servers on a cluster that is about to be stopped; what cannot be asked ends with the cluster."""
    for status in list_servers():
        ref = read_remote_ref(status.folder)
        try:
            if ref is not None and ref.cluster == cluster.name and _asked(status).is_alive:
                on_message(f"stopping the server '{status.name}'")
                server = RemoteServer(name=status.name, cluster=cluster, ref=ref)
                server.request_stop()
                server.wait()
            elif ref is None and status.is_alive and cluster.name == NAME and _uses_local(status):
                on_message(f"stopping the server '{status.name}'")
                process = server_process(status.name)
                if process is not None:
                    process.request_stop()
                    process.wait()
        except ForgeError as error:
            on_message(f"the server '{status.name}' could not be stopped: {error}")


def remote_servers_of(cluster: Cluster) -> list[str]:
    """Return the names of the servers on a remote cluster that run, or cannot be asked."""
    return [
        status.name
        for status in list_servers()
        if (ref := read_remote_ref(status.folder)) is not None
        and ref.cluster == cluster.name
        and _asked(status).is_alive
    ]


def _uses_local(status: ServerStatus) -> bool:
    local = find_local()
    return local is not None and status.record.get("ray_address") == local.address


def _asked(status: ServerStatus) -> ServerStatus:
    """The state of a server, from its cluster if it has one."""
    ref = read_remote_ref(status.folder)
    if ref is None:
        return status
    try:
        found = ask(find_known(ref.cluster), "server", ref.folder)
    except ArgumentError as error:  # the cluster was stopped
        return replace(status, record={"state": "stopped", "message": str(error), "cluster": ref.cluster})
    except ClusterError as error:
        lost = {"state": "unreachable", "message": str(error), "cluster": ref.cluster}
        return replace(status, is_alive=True, record=lost)
    return replace(status, is_alive=found["is_alive"], record={**found["record"], "cluster": ref.cluster})


def _await_launch(client: Any, ref: RemoteRef) -> None:
    """Wait until the server's process runs. Raises: ClusterError with the job's last lines."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not client.get_job_status(ref.job).is_terminal() and time.monotonic() < deadline:
        time.sleep(_POLL_S / 5)
    if client.get_job_status(ref.job) != "SUCCEEDED":
        last = [line for line in client.get_job_logs(ref.job).splitlines() if line.strip()][-3:]
        raise ClusterError(f"the server did not start: {' / '.join(last) or 'its job printed nothing'}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read: {error}") from error
