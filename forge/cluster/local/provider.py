"""The provider of this machine: the `Cluster` interface without ssh."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO
from urllib.parse import urlsplit

from forge.cluster.base import ClusterStatus, OnProgress, stdin_arguments
from forge.cluster.dashboard import ray_nodes, ray_runs
from forge.cluster.local.ray_cluster import (
    NAME,
    LocalRayCluster,
    find_local,
    read_ray_token,
    require_private_token,
    start_local,
    stop_local,
)
from forge.cluster.local.ray_process import family_of
from forge.cluster.tunnel import listens
from forge.config.cluster import LocalSpec
from forge.config.dump import dump_plain
from forge.errors import ClusterError

_JOIN_TIMEOUT_S = 10.0
_POLL_S = 0.2


class LocalCluster:
    """The Ray cluster on this machine; there is one for each user, whatever the name in its file."""

    name = NAME
    shares_files = True
    role = None
    gpu = None

    def __init__(self, spec: LocalSpec | None = None) -> None:
        self._spec = spec or LocalSpec(name=NAME, provider="local")

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        cluster = start_local(num_nodes=self._spec.nodes, port=self._spec.port)
        num_alive = sum(node.is_alive for node in cluster.nodes)
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        while True:  # the dashboard may know of a node a little later than the node itself
            found = self.status()
            if sum(node.state == "alive" for node in found.nodes) >= num_alive or time.monotonic() > deadline:
                return found
            time.sleep(_POLL_S)

    def price(self) -> None:
        return None

    def to_yaml(self) -> str:
        return dump_plain(self._spec.model_dump(mode="json", exclude_none=True))

    def status(self) -> ClusterStatus:
        cluster = find_local()
        if cluster is None:
            return ClusterStatus(name=NAME, provider="local", address=None)
        if not cluster.job_server:
            raise ClusterError("the cluster on this machine was started by forge chaos, without a dashboard to ask")
        url, token = _own_job_server(cluster), self.token()
        nodes = ray_nodes(url, token=token, prices={})
        runs = tuple(ray_runs(url, token=token))
        return ClusterStatus(
            name=NAME, provider="local", address=cluster.address, nodes=tuple(nodes), runs=runs, dashboard=url
        )

    def down(self, *, on_progress: OnProgress) -> list[str]:
        stop_local()
        return []

    def token(self) -> str:
        require_private_token()
        return read_ray_token()

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        first = sys.executable if command[0] == "python" else command[0]
        require_private_token()
        try:
            return subprocess.run(
                [first, *command[1:]],
                **stdin_arguments(stdin),
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"{command[0]} on this machine: {error}") from error

    @contextlib.contextmanager
    def job_server(self) -> Iterator[str]:
        cluster = find_local()
        if cluster is None or not cluster.job_server:
            raise ClusterError("no cluster is up on this machine; start one: forge cluster up")
        yield _own_job_server(cluster)

    def forward(self, port: int, *, local: int = 0) -> AbstractContextManager[int]:
        return contextlib.nullcontext(port)

    def shell(self, machine: str | None) -> list[str]:
        hidden = ("-u", "PYTHONSAFEPATH", "-u", "PYTHONUTF8")  # for forge's own processes
        return ["env", *hidden, os.environ.get("SHELL") or "/bin/sh"]


def _own_job_server(cluster: LocalRayCluster) -> str:
    """Return the job server's URL if the cluster's own process listens on its port.

    Raises: ClusterError otherwise: another user's process may have taken the port, and would get the token.
    """
    port = urlsplit(cluster.job_server).port or 0
    if not listens(family_of(cluster.nodes[0]), port=port):
        raise ClusterError(
            "the job server of the cluster on this machine has ended: none of its processes listens on port "
            f"{port}; start the cluster again: forge cluster down, then forge cluster up"
        )
    return cluster.job_server
