"""The agent's end of its warm process: start it, have it fork ranks, hear how they end, end it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

_ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "DEEPSPEED_LOG_LEVEL": "warning",
    # numpy's linear algebra, which no rank uses, would start threads when it is imported.
    "OPENBLAS_NUM_THREADS": "1",
}


class ForkServer:
    """The agent's end of a warm process; use `start_fork_server`, or `clone`."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        """Args:
        process: None for a clone, whose parent is the process that it was forked from.
        """
        sock.setblocking(False)
        self._socket, self._process = sock, process
        self._pid: int | None = process.pid if process is not None else None
        self._epoch = 0
        self.is_ready = False

    def clone(self) -> ForkServer:
        """Another one, forked from this one as soon as this one is warm: it shares what both have imported."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody answers: it is started anew
            socket.send_fds(self._socket, [b"clone"], [theirs.fileno()])
        theirs.close()
        return ForkServer(ours, None)

    @property
    def is_alive(self) -> bool:
        """Whether it can still be used; of a clone that has not spoken yet, that is not known."""
        if self._process is not None:
            return self._process.poll() is None
        return self._pid is None or (psutil.pid_exists(self._pid) and not _is_zombie(self._pid))

    def replan(self, plan_json: str) -> None:
        """Have it made warm for another run: it says so again."""
        self._epoch += 1
        self.is_ready = False
        plan = _memory_of(plan_json)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is about to be started anew
            socket.send_fds(self._socket, [str(self._epoch).encode()], [plan])
        os.close(plan)

    async def receive(self) -> dict[str, Any] | None:
        """What it says; None when it is gone. What it still says of the run before is passed over."""
        while True:
            try:
                text = await asyncio.get_running_loop().sock_recv(self._socket, 2**16)
            except OSError:
                return None
            if not text:
                return None
            message: dict[str, Any] = json.loads(text)
            self._pid = message.get("pid", self._pid)
            if "warm" in message and message["epoch"] == self._epoch:
                self.is_ready = True
            if self.is_ready:
                return message

    def send(self, order: dict[str, Any], fds: list[int]) -> None:
        """Have it fork a rank, which inherits the descriptors."""
        text = _memory_of(json.dumps(order))  # longer than what a socket takes, where there are many ranks
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is about to be started anew
            socket.send_fds(self._socket, [b"fork"], [text, *fds])
        os.close(text)

    def kill(self) -> None:
        """End it, and its ranks with it."""
        self._socket.close()  # which alone would end it, after what it does just now
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        elif self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


def start_fork_server(plan_json: str, *, log: Path) -> ForkServer:
    """Begin to import everything that a rank of this plan will, in a process of its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plan_fd = _memory_of(plan_json)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "forge.elastic.workers.fork_server",
                str(theirs.fileno()),
                str(plan_fd),
                str(os.getpid()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno(), plan_fd],
            env=os.environ | _ENVIRONMENT,
        )
    theirs.close()
    os.close(plan_fd)
    return ForkServer(ours, process)


class ForkServerPool:
    """Warm processes that one run after the other uses, on one machine."""

    def __init__(self, *, log: Path) -> None:
        self._log = log
        self._idle: list[ForkServer] = []
        self._first: ForkServer | None = None
        """Of which the others are clones."""

    @property
    def has_ready(self) -> bool:
        """Whether one stands ready."""
        return any(process.is_ready and process.is_alive for process in self._idle)

    def prepare(self, plan_json: str, *, count: int) -> None:
        """Begin to have so many."""
        while len(self._idle) < count:
            self._idle.append(self._another(plan_json))

    def take(self, plan_json: str) -> ForkServer:
        """One for a run of this plan: another run's, if one is idle, or a new one. It says when it is warm."""
        self._idle.sort(key=lambda process: process.is_ready)
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                process.replan(plan_json)
                return process
            process.kill()
        process = self._another(plan_json)
        if process is not self._first:
            process.replan(plan_json)
        return process

    def _another(self, plan_json: str) -> ForkServer:
        if self._first is not None and self._first.is_alive:
            return self._first.clone()
        self._first = start_fork_server(plan_json, log=self._log)
        return self._first

    def release(self, process: ForkServer) -> None:
        """A run is over that used it, and none of its ranks is left."""
        self._idle.append(process)

    def close(self) -> None:
        """End those that nobody uses."""
        while self._idle:
            self._idle.pop().kill()


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def _memory_of(text: str) -> int:
    fd = os.memfd_create("forge-text")
    os.write(fd, text.encode())
    return fd
