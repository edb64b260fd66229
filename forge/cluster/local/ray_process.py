"""One Ray node of this machine: the processes that it is made of, started, known again, ended.

A node is a `ray start --block` in a session of its own, so that the whole of it can be ended by its session and
nothing that other users of Ray run here is touched. A process is believed to be ours only if this is still the
same boot and its start still matches.
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

from forge.errors import ClusterError

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProcess:
    """One node: the process that holds it, named so that a recycled pid is not mistaken for it."""

    pid: int
    started_ticks: int
    """Since boot, as the kernel counts; unlike a time of day it never moves."""
    boot_id: str
    num_cpus: int = 0
    """As it was told; 0 if it counts them itself."""

    @property
    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        return self.boot_id == boot_id() and start_ticks(self.pid) == self.started_ticks


def launch(
    arguments: Sequence[str], *, log: Path, after: str | None = None
) -> tuple[NodeProcess, subprocess.Popen[bytes]]:
    """Begin to start a node, as a session of its own.

    Args:
        arguments: of `ray start`.
        log: where it writes.
        after: address of the head, if that may be being started just now.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *([sys.executable, "-P", "-m", "forge.cluster.ssh.wait_and_join", after] if after else [_ray()]),
        *("start", *arguments, "--block", "--disable-usage-stats"),
        # Ray's own choice is one for all nodes of a machine; without it a head takes no jobs.
        *("--dashboard-agent-listen-port", str(free_port())),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    ticks = start_ticks(process.pid)
    return NodeProcess(pid=process.pid, started_ticks=ticks or 0, boot_id=boot_id()), process


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def await_start(process: subprocess.Popen[bytes], *, log: Path) -> None:
    """Return when Ray says that the node runs. Raises: ClusterError with its last words if it does not."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ClusterError(f"a Ray node did not start: {_last_words(log)}\nIts log is {log}")
        time.sleep(0.1)


def end_node(node: NodeProcess) -> None:
    """End a node's whole family. A stranger who has its pid by now is left alone.

    Only `ray start` is asked politely and ends the others in the right order: a raylet that is asked
    after its control store has gone waits ten seconds for an answer.
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
    """A node's process, what descends from it, and what is left of its session once it has gone."""
    if node.boot_id != boot_id() or start_ticks(node.pid) not in (node.started_ticks, None):
        return []  # another boot or another process: no pid is given anew while its session has members
    members = [
        process for process in session_members(node.pid) if (start_ticks(process.pid) or 0) >= node.started_ticks
    ]
    found = set(members)
    for process in members:
        with contextlib.suppress(psutil.Error):
            found |= set(process.children(recursive=True))
    return list(found)


def session_members(leader: int) -> list[psutil.Process]:
    """The processes of a session, its leader among them as long as it lives."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader:
                members.append(process)
    return members


def start_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None if there is no such process, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in ("Z", "X") else int(fields[18])


def boot_id() -> str:
    """Another one whenever this machine was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def require_free(port: int, *, complaint: str) -> None:
    """Raises: ClusterError with the complaint, and what the kernel says, if a port cannot be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ClusterError(f"port {port} {complaint.format(error.strerror)}") from error


def free_port() -> int:
    """One that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "it said nothing"
