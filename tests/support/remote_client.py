"""A cluster that shares no files with its client: one on this machine, under another home folder.

    python -m tests.support.remote_client HERE THERE FOLDER

submits the run in FOLDER and follows it, as a client that can be killed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO
from unittest import mock

from forge.cluster.local.provider import LocalCluster
from forge.plan.plan import plan_from_json
from forge.remote.mirror import RemoteRun
from forge.remote.submit import preflight, submit
from forge.runs.reader import follow
from forge.runs.remote_ref import read_remote_ref
from tests.support.command import environment, forge


class Elsewhere(LocalCluster):
    """This machine's cluster, used like a remote one."""

    def __init__(self, there: Path) -> None:
        super().__init__()
        self._there = there

    @property
    def name(self) -> str:
        return "elsewhere"

    @property
    def shares_files(self) -> bool:
        return False

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> CompletedProcess[bytes]:
        env = home_of(self._there)
        with mock.patch.dict(os.environ, env, clear=True):
            return super().on_head(command, stdin=stdin, timeout_s=timeout_s)

    def attach(self, folder: Path) -> RemoteRun:
        """Follow a run of this cluster."""
        ref = read_remote_ref(folder)
        assert ref is not None
        return RemoteRun(folder, ref, cluster=self)


def home_of(folder: Path) -> dict[str, str]:
    """The environment of a user with this home folder, with the Ray token of this machine."""
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    kept = {name: value for name, value in environment(folder).items() if not name.startswith("AWS_")}
    return kept | {"HOME": str(folder), "RAY_AUTH_TOKEN_PATH": token}


@contextlib.contextmanager
def elsewhere(there: Path, *, num_nodes: int) -> Iterator[Elsewhere]:
    """Start the cluster, and stop it afterwards."""
    env = home_of(there)
    try:
        up = forge("cluster", "up", "--nodes", str(num_nodes), cwd=there, env=env)
        assert up.returncode == 0, up.stderr
        with mock.patch.dict(os.environ, {"FORGE_STATE": env["FORGE_STATE"]}):
            yield Elsewhere(there)
    finally:
        forge("cluster", "down", cwd=there, env=env)


def _main() -> None:
    here, there, folder = map(Path, sys.argv[1:])
    os.environ |= environment(here) | {"FORGE_STATE": str(there / "state")}
    plan = plan_from_json((folder / "plan.json").read_text())
    run = submit(preflight(Elsewhere(there)), plan, folder=folder)
    for record in follow(folder, goes_on=run.is_alive):
        if record is None:
            time.sleep(0.01)


if __name__ == "__main__":
    _main()
