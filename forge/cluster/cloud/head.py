"""The head of a rented cluster: commands on it, and what its Ray reports and requests."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO, Any

from forge.cluster.base import ClusterNode
from forge.cluster.cloud.ray_config import HEAD, TOKEN_FILE, WORKER_RESOURCE, shell_path, user_of
from forge.cluster.cloud.ray_launcher import find_capacity_error
from forge.cluster.cloud.state import cluster_folder
from forge.cluster.ssh.session import SshHost
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError

_REQUEST_TIMEOUT_S = 120.0
_HEALTH_TIMEOUT_S = 20.0

_REQUEST_WORKERS = """
import sys, ray
from ray.autoscaler.sdk import request_resources
ray.init(address="auto", logging_level="error", log_to_driver=False)
request_resources(bundles=[{sys.argv[1]: 1}] * int(sys.argv[2]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudHead:
    """The head of a cluster that is up."""

    spec: CloudSpec
    host: SshHost
    python: str
    """The Python there that has forge."""
    private_address: str

    @classmethod
    def of(cls, spec: CloudSpec, *, state: Mapping[str, Any]) -> CloudHead:
        """The head of the cluster with this saved state. Raises: ClusterError if the cluster is not up."""
        if state.get("address") is None or state.get("python") is None:
            raise ClusterError(f"the cluster '{spec.name}' is not up; start it: forge cluster up FILE")
        folder = cluster_folder(spec.name)
        host = SshHost(
            host=str(state["address"]),
            known_hosts=folder / "known_hosts",
            user=user_of(spec),
            identity_file=spec.identity_file or str(folder / "key"),
        )
        return cls(spec=spec, host=host, python=str(state["python"]), private_address=str(state["private_address"]))

    def run(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command with the environment that connects to the cluster's Ray.

        Raises: ClusterError if the head is not reached.
        """
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN_FILE, "FORGE_CLOUD": self.spec.provider}
        if self.spec.storage is not None:
            variables["FORGE_STORAGE"] = self.spec.storage
        exports = " ".join(f"{name}={shell_path(value)}" for name, value in variables.items())
        words = list(map(shlex.quote, command))
        if command[0] == "python":
            words[0] = shell_path(self.python)
        return self.host.run(f"export {exports}; exec {' '.join(words)}", stdin=stdin, timeout_s=timeout_s)

    def is_healthy(self) -> bool:
        """Whether the head is reached and its Ray answers."""
        address = f"{self.private_address}:6379"
        check = ["python", "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
        with suppress(ClusterError):
            return self.run(check, timeout_s=_HEALTH_TIMEOUT_S).returncode == 0
        return False

    def request_workers(self, count: int) -> None:
        """Make Ray's autoscaler keep at least `count` workers, of whichever type is available.

        Raises: ClusterError if Ray on the head does not answer.
        """
        command = ["python", "-P", "-c", _REQUEST_WORKERS, WORKER_RESOURCE, str(count)]
        done = self.run(command, timeout_s=_REQUEST_TIMEOUT_S)
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
            raise ClusterError(f"Ray on the head does not answer: {lines[-1]}")

    def worker_capacity_error(self) -> str | None:
        """The cloud's error code for having no workers, from the autoscaler's log; None if there is none."""
        logs = "cat ${RAY_TMPDIR:-/tmp}/ray/session_latest/logs/monitor*"
        log = self.run(["sh", "-c", logs], timeout_s=_REQUEST_TIMEOUT_S).stdout
        return find_capacity_error(log.decode(errors="replace"))


def with_price(node: ClusterNode, prices: Mapping[str, float | None]) -> ClusterNode:
    """Add a node's price; a worker's is the highest of all types, because Ray does not report its type.

    Args:
        prices: USD per hour by Ray's node type.
    """
    if node.state != "alive":
        return node
    workers = [price for node_type, price in prices.items() if node_type != HEAD]
    known = [price for price in workers if price is not None]
    highest = max(known) if known and len(known) == len(workers) else None
    return replace(node, usd_per_hour=prices.get(HEAD) if node.kind == "head" else highest)


def with_ray_state(node: ClusterNode, by_address: Mapping[str, ClusterNode]) -> ClusterNode:
    """Add what Ray reports about a node; a node that Ray does not know yet is starting."""
    ray = by_address.get(node.name)
    if ray is None:
        return replace(node, state="starting" if node.state == "alive" else node.state)
    known = replace(node, node_id=ray.node_id, num_cpus=ray.num_cpus, gpu=ray.gpu)
    return replace(known, free_cpus=ray.free_cpus, free_gpus=ray.free_gpus)
