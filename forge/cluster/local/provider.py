"""This machine as a cluster like any other: the same door, and nothing to go through."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from forge.cluster.base import ClusterStatus, OnProgress, given
from forge.cluster.dashboard import ray_nodes, ray_runs
from forge.cluster.local import ray_cluster
from forge.cluster.local.ray_cluster import find_local, require_private_token, start_local, stop_local
from forge.config.cluster import LocalSpec
from forge.config.dump import dump_plain
from forge.errors import ClusterError

NAME = "local"
"""What `--cluster` calls it."""


class LocalProvider:
    """The Ray cluster on this machine."""

    def __init__(self, spec: LocalSpec | None = None) -> None:
        self._spec = spec or LocalSpec(name=NAME, provider="local")

    @property
    def name(self) -> str:
        """There is one for each user of this machine, however its file calls it."""
        return NAME

    @property
    def shares_files(self) -> bool:
        """A run's folder here is its folder there."""
        return True

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Start it, or further nodes of it. Raises: ClusterError if the port is taken, or Ray does not start."""
        start_local(num_nodes=self._spec.nodes, port=self._spec.port)
        return self.status()

    @property
    def gpu(self) -> None:
        """Whatever this machine has."""

    def price(self) -> None:
        """It is paid for already."""

    def render(self) -> str:
        """Its file, with all defaults."""
        return dump_plain(self._spec.model_dump(mode="json", exclude_none=True))

    def status(self) -> ClusterStatus:
        """The nodes as Ray sees them. Raises: ClusterError if it does not answer."""
        cluster = find_local()
        if cluster is None:
            return ClusterStatus(name=NAME, provider="local", address=None)
        if not cluster.job_server:  # for chaos, a head is started without
            raise ClusterError("the cluster on this machine belongs to forge chaos, and says nothing of itself")
        url, token = cluster.job_server, self.token()
        nodes = ray_nodes(url, token=token, prices={})
        runs = tuple(ray_runs(url, token=token))
        return ClusterStatus(name=NAME, provider="local", address=cluster.address, nodes=tuple(nodes), runs=runs)

    def down(self, *, on_progress: OnProgress) -> list[str]:
        """End every node that was started here."""
        stop_local()
        return []

    def token(self) -> str:
        """Of Ray on this machine. Raises: ClusterError if it cannot be read."""
        require_private_token()
        return ray_cluster.token()

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command here. Raises: ClusterError if it takes too long."""
        first = sys.executable if command[0] == "python" else command[0]
        require_private_token()
        try:
            return subprocess.run(
                [first, *command[1:]], **given(stdin), capture_output=True, timeout=timeout_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"{command[0]} on this machine: {error}") from error

    @contextlib.contextmanager
    def job_server(self) -> Iterator[str]:
        """Ray's job server. Raises: ClusterError if no cluster is up."""
        cluster = find_local()
        if cluster is None or not cluster.job_server:
            raise ClusterError("no cluster is up on this machine; start one: forge cluster up")
        yield cluster.job_server

    def shell(self, machine: str | None) -> list[str]:
        """A shell on this machine is what one has already."""
        return [os.environ.get("SHELL") or str(Path("/bin/sh"))]
