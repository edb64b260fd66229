"""The Ray cluster on this machine: one head, and as many simulated nodes as requested.

Every process is saved in the cluster's record as soon as it is started, and everything that starts or stops
processes holds the cluster's lock.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from forge.cluster.base import ClusterRecord, cluster_lock, delete_state, read_record, state_folder, write_record
from forge.cluster.local.ray_process import NodeProcess, await_start, end_node, family_of, launch, require_free
from forge.environment import home_folder, require_loopback, require_ray_folder
from forge.errors import ClusterError
from forge.limits import usable_cpus
from forge.process import free_port

NAME = "local"
"""The cluster's name; no other cluster may have it."""
# Shared memory for Ray's objects; forge passes none of its tensors through them.
_OBJECT_STORE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRayCluster:
    """A cluster that runs on this machine; the first node is the head."""

    address: str
    """Address of Ray's control store; empty in the record while the head starts."""
    nodes: tuple[NodeProcess, ...]
    job_server: str = ""
    """URL of Ray's job server, on loopback; empty where the head was started without one."""


def find_local() -> LocalRayCluster | None:
    """The cluster that is up on this machine; None if there is none or its head is gone."""
    cluster = _recorded()
    return cluster if cluster is not None and cluster.address and cluster.nodes[0].is_alive else None


def start_local(*, num_nodes: int = 1, port: int | None = None) -> LocalRayCluster:
    """Start a cluster, or add nodes to the one that is up until it has `num_nodes`.

    A single node gets all cores of this machine; several share them, with at least one each.

    Raises: ClusterError if the port is taken, or Ray does not start.
    """
    require_private_token()
    require_ray_folder()
    require_loopback()
    with cluster_lock(NAME, wait=True):
        cluster = find_local()
        if cluster is None:
            _end_recorded()
            port = port or free_port()
            message = "cannot be used for the cluster's head: {}; choose another with --port, or omit --port"
            require_free(port, message=message)
            cluster = _start_head(port=port, num_cpus=_cpus_per_node(num_nodes), has_job_server=True)
        for _ in range(num_nodes - sum(node.is_alive for node in cluster.nodes)):
            cluster = _with_node(cluster, _further_node(cluster), num_cpus=_cpus_per_node(num_nodes))
        return cluster


def start_head_alone() -> LocalRayCluster:
    """Start a head without CPUs, so that workers run only on nodes that `add_node` adds and `kill_node` removes.

    Raises: ClusterError if a cluster is up, or Ray does not start.
    """
    require_private_token()
    require_ray_folder()
    require_loopback()
    with cluster_lock(NAME, wait=True):
        if find_local() is not None:
            raise ClusterError("a cluster is already up on this machine; stop it: forge cluster down")
        _end_recorded()
        return _start_head(port=free_port(), num_cpus=0, has_job_server=False)


def add_node(*, num_cpus: int = 1) -> NodeProcess:
    """Add a simulated node to the cluster that is up. Raises: ClusterError if none is, or Ray does not start."""
    with cluster_lock(NAME, wait=True):
        cluster = find_local()
        if cluster is None:
            raise ClusterError("no cluster is up on this machine")
        return _with_node(cluster, _further_node(cluster), num_cpus=num_cpus).nodes[-1]


def kill_node(node: NodeProcess) -> None:
    """Kill all processes of a simulated node at once, as a machine that vanishes."""
    for process in family_of(node):
        with suppress(psutil.Error):
            process.kill()


def stop_local() -> int:
    """End every node that was started on this machine. Returns: how many there were."""
    with cluster_lock(NAME, wait=True):
        return _end_recorded()


def require_private_token() -> None:
    """Make Ray require its token on all ports, and make the token readable by its owner only.

    Call it before Ray is imported: a process that connects to a cluster reads the mode then.

    Raises: ClusterError if the token cannot be written.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Ray would create it too, but readable by everyone.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise ClusterError(
            f"Ray's token {path} cannot be written: {error.strerror}; set HOME to a folder that this user can "
            "write, or RAY_AUTH_TOKEN_PATH to a file"
        ) from error


def read_ray_token() -> str:
    """Return Ray's token on this machine; call `require_private_token` first.

    Raises: ClusterError if it cannot be read.
    """
    try:
        return os.environ.get("RAY_AUTH_TOKEN") or token_path().read_text().strip()
    except OSError as error:
        raise ClusterError(f"Ray's token {token_path()} cannot be read: {error.strerror}") from error


def token_path() -> Path:
    """The file of Ray's token on this machine."""
    chosen = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(chosen) if chosen else home_folder() / ".ray" / "auth_token"


def _start_head(*, port: int, num_cpus: int, has_job_server: bool) -> LocalRayCluster:
    """Start the head. Its job server is part of Ray's dashboard, which costs one more process."""
    arguments = ["--head", "--port", str(port), "--include-dashboard", str(has_job_server).lower()]
    job_server = ""
    if has_job_server:
        dashboard_port = free_port()
        arguments += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port)]
        job_server = f"http://127.0.0.1:{dashboard_port}"
    cluster = LocalRayCluster(address=f"{_node_ip()}:{port}", nodes=(), job_server=job_server)
    return _with_node(cluster, [*arguments, "--log-color", "false"], num_cpus=num_cpus)


def _further_node(cluster: LocalRayCluster) -> list[str]:
    """Return the arguments of a node beside the head's: one process reads the logs of all nodes of a machine."""
    return ["--address", cluster.address, "--include-log-monitor", "false"]


def _with_node(cluster: LocalRayCluster, arguments: list[str], *, num_cpus: int) -> LocalRayCluster:
    """Start one more node and wait until it runs; if it does not, end its processes and restore the record.

    Raises: ClusterError with the end of Ray's log.
    """
    log = state_folder() / f"node-{len(cluster.nodes)}.log"
    cpus = ["--num-cpus", str(num_cpus), "--object-store-memory", str(_OBJECT_STORE_BYTES)]
    node, process = launch([*arguments, *cpus], log=log)
    node = replace(node, num_cpus=num_cpus)
    grown = replace(cluster, nodes=(*cluster.nodes, node))
    try:
        _record(grown if cluster.nodes else replace(grown, address=""))
        await_start(process, log=log)
        _record(grown)
    except BaseException:  # Ctrl-C too
        end_node(node)
        process.wait()
        if cluster.nodes:
            _record(cluster)
        else:
            delete_state(NAME)
        raise
    return grown


def _end_recorded() -> int:
    """End all nodes of the record and delete it. Returns: how many still ran."""
    cluster = _recorded()
    nodes = cluster.nodes if cluster is not None else ()
    count = sum(node.is_alive for node in nodes)
    for node in reversed(nodes):
        end_node(node)
    delete_state(NAME)
    return count


def _recorded() -> LocalRayCluster | None:
    """Return the recorded cluster, running or not; None if there is no readable record."""
    record = read_record(NAME)
    try:
        state: Mapping[str, Any] = record.state if record is not None else {}
        nodes = tuple(NodeProcess(**node) for node in state["nodes"])
        return LocalRayCluster(**{**state, "nodes": nodes}) if nodes else None
    except (KeyError, TypeError):
        return None


def _record(cluster: LocalRayCluster) -> None:
    write_record(ClusterRecord(name=NAME, provider="local", spec={}, state=asdict(cluster)))


def _cpus_per_node(num_nodes: int) -> int:
    return max(1, usable_cpus() // num_nodes)


def _node_ip() -> str:
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())
