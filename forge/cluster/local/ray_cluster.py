"""The cluster on this machine: one Ray head, and as many simulated machines as asked for.

What was started is written down in the state folder, from its first instant. Who starts or stops holds a lock,
so that two do not mix.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from forge.cluster.local.ray_process import (
    NodeProcess,
    await_start,
    end_node,
    family_of,
    free_port,
    launch,
    require_free,
)
from forge.errors import ClusterError

# Shared memory for Ray's objects; forge passes none of its tensors through them.
_OBJECT_STORE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRayCluster:
    """A cluster that `start_local` started; the first node is the head."""

    address: str
    """Empty in the state file while the head starts, when only its process is worth knowing."""
    nodes: tuple[NodeProcess, ...]
    job_server: str = ""
    """URL of Ray's job server, on loopback; empty where the head was started without one."""


def find_local() -> LocalRayCluster | None:
    """The cluster that is up on this machine; None if there is none or its head is gone."""
    try:
        body = json.loads(_state_path().read_text())
        nodes = tuple(NodeProcess(**node) for node in body["nodes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not nodes or not nodes[0].is_alive or not body["address"]:
        return None
    return LocalRayCluster(address=body["address"], nodes=nodes, job_server=body.get("job_server", ""))


def start_local(*, num_nodes: int = 1, port: int | None = None) -> LocalRayCluster:
    """Start a cluster, or return the one that is up, with further nodes if more are asked for.

    One node has all cores of this machine; several share them, at least one each.

    Raises: ClusterError if the port is taken, or Ray does not start.
    """
    require_private_token()
    with _only_one():
        cluster = find_local()
        if cluster is None:
            _end_leftovers()
            port = port or free_port()
            complaint = "cannot be used for the cluster's head: {}; choose another with --port, or leave it out"
            require_free(port, complaint=f"{complaint} to take a free one")
            cluster = _start_head(port=port, num_cpus=_cpus_per_node(num_nodes), takes_jobs=True)
        for _ in range(num_nodes - sum(node.is_alive for node in cluster.nodes)):
            cluster = _with_node(cluster, ["--address", cluster.address], num_cpus=_cpus_per_node(num_nodes))
        return cluster


def start_head_alone() -> LocalRayCluster:
    """Start a cluster whose head takes no ranks, for machines that `add_node` adds and `kill_node` takes away.

    Raises: ClusterError if one is up, or Ray does not start.
    """
    require_private_token()
    with _only_one():
        if find_local() is not None:
            raise ClusterError("a cluster is up on this machine already; take it down with forge cluster down")
        _end_leftovers()
        return _start_head(port=free_port(), num_cpus=0, takes_jobs=False)


def add_node(*, num_cpus: int = 1) -> NodeProcess:
    """Add a simulated machine to the cluster that is up. Raises: ClusterError if none is, or Ray does not start."""
    with _only_one():
        cluster = find_local()
        if cluster is None:
            raise ClusterError("no cluster is up on this machine")
        return _with_node(cluster, ["--address", cluster.address], num_cpus=num_cpus).nodes[-1]


def kill_node(node: NodeProcess) -> None:
    """Have a simulated machine vanish: every process of it at once, without a word."""
    for process in family_of(node):
        with contextlib.suppress(psutil.Error):
            process.kill()


def stop_local() -> int:
    """End every node that was started here. Returns: how many there were."""
    with _only_one():
        return _end_leftovers()


def list_nodes(cluster: LocalRayCluster) -> list[dict[str, Any]]:
    """The nodes as Ray sees them now: id, state, address, CPUs in all and free, GPUs.

    Raises: ClusterError if the cluster does not answer.
    """
    require_private_token()
    import ray

    try:
        ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        free = ray.state.available_resources_per_node()
        return [
            {
                "node_id": node["NodeID"],
                "state": "alive" if node["Alive"] else "dead",
                "ip": node["NodeManagerAddress"],
                "cpus": node["Resources"].get("CPU", 0.0),
                "free_cpus": free.get(node["NodeID"], {}).get("CPU", 0.0),
                "gpus": node["Resources"].get("GPU", 0.0),
            }
            for node in ray.nodes()
        ]
    except Exception as error:  # Ray raises many unrelated classes here
        raise ClusterError(f"the cluster at {cluster.address} does not answer: {error}") from error
    finally:
        ray.shutdown()


def require_private_token() -> None:
    """Have Ray guard all its ports with its token, and the token readable by its owner alone.

    To be called before Ray is imported: a process that connects to a cluster reads the mode then.

    Raises: ClusterError if the token cannot be written.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Ray would make it too, but readable by everyone.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise ClusterError(f"Ray's token {path} cannot be written: {error.strerror}") from error


def token() -> str:
    """Ray's token on this machine, after `require_private_token`. Raises: ClusterError if it cannot be read."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    try:
        return os.environ.get("RAY_AUTH_TOKEN") or path.read_text().strip()
    except OSError as error:
        raise ClusterError(f"Ray's token {path} cannot be read: {error.strerror}") from error


def _start_head(*, port: int, num_cpus: int, takes_jobs: bool) -> LocalRayCluster:
    """Start the head; its job server is part of Ray's dashboard, which costs a process more."""
    arguments = ["--head", "--port", str(port), "--include-dashboard", str(takes_jobs).lower()]
    job_server = ""
    if takes_jobs:
        dashboard_port = free_port()
        arguments += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port)]
        job_server = f"http://127.0.0.1:{dashboard_port}"
    cluster = LocalRayCluster(address=f"{_node_ip()}:{port}", nodes=(), job_server=job_server)
    return _with_node(cluster, [*arguments, "--log-color", "false"], num_cpus=num_cpus)


def _with_node(cluster: LocalRayCluster, arguments: list[str], *, num_cpus: int) -> LocalRayCluster:
    """Start one more node and wait until Ray says that it runs; nothing of it stays if it does not.

    Raises: ClusterError with Ray's last words.
    """
    log = _state_path().with_name(f"node-{len(cluster.nodes)}.log")
    cpus = ["--num-cpus", str(num_cpus), "--object-store-memory", str(_OBJECT_STORE_BYTES)]
    node, process = launch([*arguments, *cpus], log=log)
    node = replace(node, num_cpus=num_cpus)
    grown = replace(cluster, nodes=(*cluster.nodes, node))
    try:
        _write_state(grown if cluster.nodes else replace(grown, address=""))
        await_start(process, log=log)
        _write_state(grown)
    except BaseException:  # Ctrl-C too
        end_node(node)
        process.wait()
        if cluster.nodes:
            _write_state(cluster)
        else:
            _state_path().unlink(missing_ok=True)
        raise
    return grown


def _end_leftovers() -> int:
    """End the processes written down in the state file, and forget them. Returns: how many still ran."""
    try:
        nodes = [NodeProcess(**node) for node in json.loads(_state_path().read_text())["nodes"]]
    except (OSError, ValueError, KeyError, TypeError):
        nodes = []
    count = sum(node.is_alive for node in nodes)
    for node in reversed(nodes):
        end_node(node)
    _state_path().unlink(missing_ok=True)
    return count


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Wait until nobody else starts or stops this machine's cluster."""
    path = _state_path().with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError as error:
        raise ClusterError(f"the state folder {path.parent} cannot be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_state(cluster: LocalRayCluster) -> None:
    path = _state_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(cluster), indent=1) + "\n")
    draft.replace(path)


def _state_path() -> Path:
    home = os.environ.get("FORGE_STATE") or Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "forge"
    return Path(home).expanduser() / "cluster.json"


def _cpus_per_node(num_nodes: int) -> int:
    return max(1, (os.cpu_count() or 1) // num_nodes)


def _node_ip() -> str:
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())
