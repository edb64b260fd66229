"""The agent's client of the fork server: start it, fork ranks, report how they end, and pool fork servers."""

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

from forge.elastic.workers.allocator import allocator_settings
from forge.foreign import read_file_end
from forge.process import is_alive, open_log

_ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "DEEPSPEED_LOG_LEVEL": "warning",
    # Importing numpy would start threads for its linear algebra, which no rank uses.
    "OPENBLAS_NUM_THREADS": "1",
    # Importing pyarrow, which DeepSpeed does by way of mlflow where that is installed, would start a thread.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}

_MAX_LAST_LINE_BYTES = 2000
_END_S = 10.0
"""How long a process may take to end after its socket was closed."""


class ForkServer:
    """Connection to a fork server; created by `start_fork_server` and `clone`."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        """Args:
        process: None for a clone, whose parent is the fork server it was forked from.
        """
        sock.setblocking(False)
        self._socket, self._process = sock, process
        self._pid: int | None = process.pid if process is not None else None
        self._epoch = 0
        self.is_ready = False

    def clone(self) -> ForkServer:
        """Fork another fork server from this one as soon as this one is ready; it shares the imported modules."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; the clone reports the same
            socket.send_fds(self._socket, [b"clone"], [theirs.fileno()])
        theirs.close()
        return ForkServer(ours, None)

    @property
    def is_alive(self) -> bool:
        """Whether it can still be used; assumed of a clone that has not sent its pid yet."""
        if self._process is not None:
            return self._process.poll() is None
        return self._pid is None or is_alive(self._pid)

    async def wait_ended(self) -> str:
        """Wait for the end of the process, which has closed its socket, and return how it ended."""
        try:
            code = None if self._process is None else await asyncio.to_thread(self._process.wait, timeout=_END_S)
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            return "ended"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def replan(self, plan_json: str) -> None:
        """Import everything for another run's plan; it reports again when it is ready."""
        self._epoch += 1
        self.is_ready = False
        plan = memory_of(plan_json)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died and is about to be replaced
            socket.send_fds(self._socket, [str(self._epoch).encode()], [plan])
        os.close(plan)

    async def receive(self) -> dict[str, Any] | None:
        """Receive its next message; None when it is gone. Messages about the former run are skipped."""
        while True:
            try:
                text = await asyncio.get_running_loop().sock_recv(self._socket, 2**16)
            except OSError:
                return None
            if not text:
                return None
            message: dict[str, Any] = json.loads(text)
            if "ready" in message:  # the pid of a "forked" message is that of the rank
                self._pid = message.get("pid", self._pid)
                self.is_ready = self.is_ready or message["epoch"] == self._epoch
            if self.is_ready:
                return message

    def fork(self, spec: dict[str, Any], *, fds: list[int]) -> None:
        """Fork a rank from it, which inherits the file descriptors."""
        text = memory_of(json.dumps(spec))  # with many ranks longer than a socket message can be
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died and is about to be replaced
            socket.send_fds(self._socket, [b"fork"], [text, *fds])
        os.close(text)

    def fork_standby(self, spec: dict[str, Any], *, fd: int) -> None:
        """Fork a standby process from it, which inherits its end of a socket."""
        text = memory_of(json.dumps(spec))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._socket, [b"standby"], [text, fd])
        os.close(text)

    def kill(self) -> None:
        """Kill it, and its ranks with it."""
        self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        elif self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


def start_fork_server(plan_json: str, *, log: Path) -> ForkServer:
    """Start a process that imports everything that a rank of this plan needs."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plan_fd = memory_of(plan_json)
    with os.fdopen(open_log(log), "ab") as output:
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
            env=allocator_settings() | os.environ | _ENVIRONMENT,
        )
    theirs.close()
    os.close(plan_fd)
    return ForkServer(ours, process)


class ForkServerPool:
    """Fork servers on one node that one run uses after another."""

    def __init__(self, *, log: Path) -> None:
        self._log = log
        self._idle: list[ForkServer] = []
        self._first: ForkServer | None = None
        """The others are its clones."""

    @property
    def has_ready(self) -> bool:
        """Whether an idle fork server is ready."""
        return any(process.is_ready and process.is_alive for process in self._idle)

    @property
    def log_text(self) -> str:
        """The last line that a fork server has written to its log, after a colon, and the log's name."""
        try:
            lines = read_file_end(self._log, max_bytes=_MAX_LAST_LINE_BYTES).decode(errors="replace").splitlines()
        except OSError:
            return ""
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {last} ({self._log.name})" if last else ""

    def prepare(self, plan_json: str, *, count: int) -> None:
        """Start fork servers until `count` are idle."""
        while len(self._idle) < count:
            self._idle.append(self._new(plan_json))

    def take(self, plan_json: str) -> ForkServer:
        """Return a fork server for a run of this plan, an idle one if possible."""
        self._idle.sort(key=lambda process: process.is_ready)
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                process.replan(plan_json)
                return process
            process.kill()
        process = self._new(plan_json)
        if process is not self._first:
            process.replan(plan_json)
        return process

    def _new(self, plan_json: str) -> ForkServer:
        if self._first is not None and self._first.is_alive:
            return self._first.clone()
        self._first = start_fork_server(plan_json, log=self._log)
        return self._first

    def release(self, process: ForkServer) -> None:
        """Return a fork server after a run that has no ranks left."""
        self._idle.append(process)

    def close(self) -> None:
        """Kill the idle fork servers."""
        while self._idle:
            self._idle.pop().kill()


def memory_of(text: str) -> int:
    """Write a text to anonymous memory. Returns: its file descriptor."""
    fd = os.memfd_create("forge-text")
    os.write(fd, text.encode())
    return fd
