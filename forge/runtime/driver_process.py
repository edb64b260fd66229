"""The driver process of a run on this machine: start it, signal it, wait for it.

`RunHandle` is what the CLI and the Python API hold while a run is in progress, on this machine (`LocalRun`) or on a
remote cluster (`forge.remote.mirror.RemoteRun`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from forge.cluster.local.ray_cluster import find_local
from forge.cluster.local.ray_process import session_members
from forge.environment import child_environment
from forge.errors import ArgumentError
from forge.process import has_open, is_alive, open_log, start_ticks
from forge.runs.lock import LOCK, driver_pid

DRIVER_MODULE = "forge.runtime.driver"
"""Run with `python -m`. Tests of the CLI and the API replace it by a scripted driver, and nothing else."""
MAP_DRIVER_MODULE = "forge.runtime.map_driver"
SERVER_MODULE = "forge.runtime.serve_process"
MAP, INPUTS, RESULTS = "map.json", "inputs.jsonl", "results"
"""Files in the folder of a map: what is computed, a shard on each line, and the results."""
_POLL_S = 0.05


class RunHandle(Protocol):
    """A run in progress; its events and metrics appear in `folder` on this machine."""

    @property
    def folder(self) -> Path:
        """The run folder on this machine."""

    def is_alive(self) -> bool:
        """Whether more events or metrics may come."""

    def request_stop(self) -> None:
        """Ask the run to checkpoint and stop; the second call stops it at once. Does not block."""

    def wait(self) -> None:
        """Return once the driver has ended and no process of the run is left."""

    def connection_messages(self) -> list[str]:
        """Messages since the last call about how the run is reached, such as a lost ssh connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRun:
    """A run whose driver is a process of this machine."""

    folder: Path
    pid: int
    """Of the driver."""
    started_at: int | None = None
    """Start time of that process, where it was the driver for certain."""

    def is_alive(self) -> bool:
        return is_alive(self.pid)

    def request_stop(self) -> None:
        # Without its folder a run has no lock that proves which process is its driver.
        if is_driver(self.folder, self.pid) or self.started_at == start_ticks(self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Wait for the driver, and kill what it left behind if it was killed.

        Ranks end by themselves then, but Ray's own processes would retry for a minute to report each other's death.
        """
        wait_until_free(self.folder)
        if not is_alive(self.pid):
            for process in session_members(self.pid):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def connection_messages(self) -> list[str]:
        return []


def start_driver(folder: Path) -> LocalRun:
    """Start the driver of a run in its own session; return once it holds the run's lock.

    It uses the cluster that is up on this machine, otherwise starts one that ends with it. A driver that ends
    before it holds the lock has written the reason to `logs/driver.log`.
    """
    process = start_holder(DRIVER_MODULE, folder=folder, log="driver.log")
    return LocalRun(folder=folder, pid=process.pid, started_at=start_ticks(process.pid))


def start_holder(module: str, *, folder: Path, log: str) -> subprocess.Popen[bytes]:
    """Start a module in a session of its own; return once it holds the folder's lock, or has ended.

    It is given the address of the cluster that is up on this machine, if there is one. Ctrl-C meanwhile ends it:
    no handle was returned.
    """
    cluster = find_local()
    command = [sys.executable, "-P", "-m", module, str(folder)]
    if cluster is not None:
        command += ["--address", cluster.address]
    with os.fdopen(open_log(folder / "logs" / log), "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=child_environment(),
        )
    try:
        while driver_pid(folder) != process.pid and process.poll() is None:
            time.sleep(_POLL_S)
    except BaseException:
        process.terminate()
        raise
    return process


def find_local_run(folder: Path) -> LocalRun | None:
    """Return a handle to a run whose driver is a process of this machine; None if it has none.

    Raises: ArgumentError if the run's lock is held, and names a process that does not hold it.
    """
    pid = driver_pid(folder)
    if pid is None:
        return None
    if not is_driver(folder, pid):
        raise ArgumentError(
            f"{folder / LOCK} is held by a process of another user or machine, and names process {pid} of this "
            "machine, which is not the run's driver"
        )
    return LocalRun(folder=folder, pid=pid, started_at=start_ticks(pid))


def is_driver(folder: Path, pid: int) -> bool:
    """Whether a process is the driver of a run: it has the run's lock open."""
    return pid > 1 and has_open(pid, folder / LOCK)


def wait_until_free(folder: Path) -> None:
    """Return once no driver holds the run's lock."""
    while driver_pid(folder) is not None:
        time.sleep(_POLL_S)
