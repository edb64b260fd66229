"""The runs on a cluster: find their folders on this machine, and stop them before the cluster moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from forge.cluster.base import Cluster
from forge.errors import ClusterError
from forge.remote.mirror import find_run_handle
from forge.remote.servers import remote_servers_of
from forge.runs.index import read_index
from forge.runs.reader import read_run
from forge.runs.remote_ref import read_remote_ref

_STOP_TIMEOUT_S = 1800.0
"""For the current step and its checkpoint."""
_POLL_S = 0.1


def find_cluster_runs(cluster: Cluster) -> list[Path]:
    """Return the folders of the runs and searches that run on a cluster.

    Raises: ClusterError if it does not answer, or if something runs there that this machine cannot start again: a
        server, or a run whose folder is not here.
    """
    status = cluster.status()
    if status.address is None:
        raise ClusterError(f"the cluster '{cluster.name}' is not up; start it: forge cluster up FILE")
    servers = remote_servers_of(cluster)
    if servers:
        raise ClusterError(
            f"the cluster '{cluster.name}' has the server {', '.join(servers)}, which would end without notice; "
            f"stop it first: forge serve stop {servers[0]}"
        )
    known = {folder.name: folder for folder in read_index().existing() if _is_on(folder, cluster)}
    others = [run for run in status.runs if run not in known]
    if others:
        raise ClusterError(
            f"{', '.join(others)} on '{cluster.name}' was not started from this machine, so it cannot be resumed "
            "from here; stop it where it was started: forge runs stop RUN"
        )
    return [known[run] for run in status.runs]


def stop_runs(folders: Sequence[Path], *, on_message: Callable[[str], None]) -> list[Path]:
    """Stop runs after their current step, with a checkpoint each. Returns: those that are to be resumed.

    Raises: ClusterError for a run that did not stop, or has ended with an error.
    """
    handles = [handle for folder in folders if (handle := find_run_handle(folder)) is not None]
    for handle in handles:
        on_message(f"stopping {handle.folder.name} with a checkpoint")
        handle.request_stop()
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    for handle in handles:
        while handle.is_alive() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        run = read_run(handle.folder)
        if run.status not in ("stopped", "finished"):
            for line in handle.connection_messages():
                on_message(line)
            raise ClusterError(
                f"{handle.folder.name} was asked to stop, and is {run.status}: nothing was moved. See forge runs "
                f"show {handle.folder.name}"
            )
    return [folder for folder in folders if read_run(folder).status == "stopped"]


def _is_on(folder: Path, cluster: Cluster) -> bool:
    ref = read_remote_ref(folder)
    return ref is not None and ref.cluster == cluster.name
