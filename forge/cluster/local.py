"""The cluster on this machine: one Ray head, and as many simulated machines as asked for.

Every node is a `ray start --block` in a session of its own, so that the whole of it can be ended by
its process group and nothing that other users of Ray run here is touched. What was started is written
down in the state folder; a process is believed to be ours only if its start time still matches.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from forge.errors import ClusterError

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
# Shared memory for Ray's objects; forge passes none of its tensors through them.
_OBJECT_STORE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProcess:
    """One node: the process that holds it, named so that a recycled pid is not mistaken for it."""

    pid: int
    started: float
    """`psutil.Process.create_time`, seconds since the epoch."""
    num_cpus: int

    @property
    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return bool(
                abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.Error:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """A cluster that `start_local` started; the first node is the head."""

    address: str
    nodes: tuple[NodeProcess, ...]


def find_local() -> LocalCluster | None:
    """The cluster that is up on this machine; None if there is none or its head is gone."""
    try:
        body = json.loads(_state_path().read_text())
        nodes = tuple(NodeProcess(**node) for node in body["nodes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not nodes or not nodes[0].is_alive:
        return None
    return LocalCluster(address=body["address"], nodes=nodes)


def start_local(*, num_nodes: int = 1, port: int | None = None) -> LocalCluster:
    """Start a cluster, or return the one that is up, with further nodes if more are asked for.

    One node has all cores of this machine; several share them, at least one each.

    Raises: ClusterError if the port is taken, or Ray does not start.
    """
    cluster = find_local()
    if cluster is None:
        _end_leftovers()
        port = port or _free_port()
        _require_free(port)
        cluster = _start_head(port=port, num_cpus=_cpus_per_node(num_nodes))
    missing = num_nodes - sum(node.is_alive for node in cluster.nodes)
    for _ in range(missing):
        node = _start_node(
            ["--address", cluster.address], num_cpus=_cpus_per_node(num_nodes), number=len(cluster.nodes)
        )
        cluster = LocalCluster(address=cluster.address, nodes=(*cluster.nodes, node))
        _write_state(cluster)
    return cluster


def stop_local() -> int:
    """End every node that was started here. Returns: how many there were."""
    return _end_leftovers()


def list_nodes(cluster: LocalCluster) -> list[dict[str, Any]]:
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
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if path.is_file() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


def _start_head(*, port: int, num_cpus: int) -> LocalCluster:
    require_private_token()
    head = _start_node(["--head", "--port", str(port)], num_cpus=num_cpus, number=0)
    address = f"{_node_ip()}:{port}"
    cluster = LocalCluster(address=address, nodes=(head,))
    _write_state(cluster)
    return cluster


def _start_node(arguments: list[str], *, num_cpus: int, number: int) -> NodeProcess:
    """Start one node and wait until Ray says that it runs. Raises: ClusterError with Ray's last words."""
    log = _state_path().with_name(f"node-{number}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", *arguments, "--block"),
        *("--num-cpus", str(num_cpus), "--object-store-memory", str(_OBJECT_STORE_BYTES)),
        *("--include-dashboard", "false", "--disable-usage-stats", "--log-color", "false"),
    ]
    if "--head" not in arguments:
        command = [part for part in command if part not in ("--include-dashboard", "false", "--log-color")]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    node = NodeProcess(pid=process.pid, started=psutil.Process(process.pid).create_time(), num_cpus=num_cpus)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            _end(node)
            raise ClusterError(f"a Ray node did not start: {_last_words(log)}\nIts log is {log}")
        time.sleep(0.1)
    return node


def _end_leftovers() -> int:
    """End the processes written down in the state file, and forget them."""
    try:
        nodes = [NodeProcess(**node) for node in json.loads(_state_path().read_text())["nodes"]]
    except (OSError, ValueError, KeyError, TypeError):
        nodes = []
    for node in reversed(nodes):
        _end(node)
    _state_path().unlink(missing_ok=True)
    return len(nodes)


def _end(node: NodeProcess) -> None:
    """End a node's whole family: politely, then not."""
    try:
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    except psutil.Error:
        family = []
    if not node.is_alive:
        family = []
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for process in family:
            try:
                process.send_signal(kind)
            except psutil.Error:
                continue
        _, family = psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
    # What Ray started and left its parent is still in the session of `ray start`.
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == node.pid:
                process.kill()
        except (psutil.Error, OSError):
            continue


def _write_state(cluster: LocalCluster) -> None:
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ClusterError(
                f"port {port} cannot be used for the cluster's head: {error.strerror}; choose another with --port, "
                "or leave --port out to take a free one"
            ) from error


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "it said nothing"
