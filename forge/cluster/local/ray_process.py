"""One Ray node of this machine: start its processes, recognise them later, end them.

A node is a `ray start --block` in its own session, so that all of it can be ended by its session while the Ray
processes of other users stay untouched. A process counts as ours only if the machine has not rebooted since and
the process's start time still matches.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from forge.environment import child_environment
from forge.errors import ClusterError
from forge.process import free_port, start_ticks

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProcess:
    """The `ray start --block` process of one node, identified even if its pid is reused."""

    pid: int
    started_ticks: int
    """Clock ticks from boot to its start; unlike a time of day it never changes."""
    boot_id: str
    num_cpus: int = 0
    """The CPUs that Ray was given; 0 if Ray counts them itself."""

    @property
    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        return self.boot_id == boot_id() and start_ticks(self.pid) == self.started_ticks


def launch(
    arguments: Sequence[str], *, log: Path, after: str | None = None
) -> tuple[NodeProcess, subprocess.Popen[bytes]]:
    """Launch a node in its own session, without waiting for it.

    Args:
        arguments: arguments of `ray start`.
        log: file for its output.
        after: address of a head that may still be starting; the node waits for its port.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-P", "-m", "forge.cluster.ray_cli", *(["--after", after] if after else [])),
        *("start", *arguments, "--block", "--disable-usage-stats"),
        # Ray's default is one port for all nodes of a machine; without this agent a head accepts no jobs.
        *("--dashboard-agent-listen-port", str(free_port())),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=child_environment(),
        )
    ticks = start_ticks(process.pid)
    return NodeProcess(pid=process.pid, started_ticks=ticks or 0, boot_id=boot_id()), process


def await_start(process: subprocess.Popen[bytes], *, log: Path) -> None:
    """Wait until Ray logs that the node runs. Raises: ClusterError with the end of its log if it does not start."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ClusterError(f"a Ray node did not start: {_last_lines(log)}\nIts log is {log}")
        time.sleep(0.1)


def end_node(node: NodeProcess) -> None:
    """End all processes of a node. A foreign process that has its pid by now is left alone.

    Only `ray start` gets SIGTERM; it ends the others in the right order. A raylet that gets SIGTERM after its
    control store has gone waits ten seconds for an answer.
    """
    family = family_of(node)
    if node.is_alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.pid, signal.SIGTERM)
        psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
    left = [process for process in {*family, *family_of(node)} if process.is_running()]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_STOP_TIMEOUT_S)


def family_of(node: NodeProcess) -> list[psutil.Process]:
    """A node's process and its descendants, and the rest of its session after the process has gone."""
    if node.boot_id != boot_id() or start_ticks(node.pid) not in (node.started_ticks, None):
        return []  # another boot or another process: Linux reuses no pid while its session has members
    members = [
        process for process in session_members(node.pid) if (start_ticks(process.pid) or 0) >= node.started_ticks
    ]
    found = set(members)
    for process in members:
        with contextlib.suppress(psutil.Error):
            found |= set(process.children(recursive=True))
    return list(found)


def session_members(leader: int) -> list[psutil.Process]:
    """Return the processes of a session, including its leader if it is alive."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader:
                members.append(process)
    return members


def boot_id() -> str:
    """An id that changes whenever this machine boots."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def require_free(port: int, *, message: str) -> None:
    """Check that a port can be bound.

    Args:
        message: what to say after "port N" if not; `{}` becomes the kernel's reason.

    Raises: ClusterError with that message.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ClusterError(f"port {port} {message.format(error.strerror)}") from error


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "its log is empty"
