"""The agent's end of its warm process: start it, have it fork ranks, hear how they end, end it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "DEEPSPEED_LOG_LEVEL": "warning",
    # numpy's linear algebra, which no rank uses, would start threads when it is imported.
    "OPENBLAS_NUM_THREADS": "1",
}


class WarmProcess:
    """The agent's end of its warm process."""

    def __init__(self, plan_json: str, *, log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plan_fd = _memory_of(plan_json)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "forge.elastic.warm", str(theirs.fileno()), str(plan_fd), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno(), plan_fd],
                env=os.environ | _ENVIRONMENT,
            )
        theirs.close()
        os.close(plan_fd)
        ours.setblocking(False)
        self._socket = ours
        self._epoch = 0
        self.is_warm = False

    @property
    def is_alive(self) -> bool:
        """Whether it can still be used."""
        return self._process.poll() is None

    def adopt(self, plan_json: str) -> None:
        """Have it made warm for another run: it says so again."""
        self._epoch += 1
        self.is_warm = False
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
            if "warm" in message and message["epoch"] == self._epoch:
                self.is_warm = True
            if self.is_warm:
                return message

    def send(self, order: dict[str, Any], fds: list[int]) -> None:
        """Have it fork a rank, which inherits the descriptors."""
        text = _memory_of(json.dumps(order))  # longer than what a socket takes, where there are many ranks
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is about to be started anew
            socket.send_fds(self._socket, [b"fork"], [text, *fds])
        os.close(text)

    def kill(self) -> None:
        """End it, and its ranks with it."""
        self._process.kill()
        self._process.wait()
        self._socket.close()


class WarmPool:
    """Warm processes that one run after the other uses, on one machine."""

    def __init__(self, *, log: Path) -> None:
        self._log = log
        self._idle: list[WarmProcess] = []

    @property
    def has_warm(self) -> bool:
        """Whether one stands ready."""
        return any(process.is_warm and process.is_alive for process in self._idle)

    def prepare(self, plan_json: str, *, count: int) -> None:
        """Begin to have so many."""
        while len(self._idle) < count:
            self._idle.append(WarmProcess(plan_json, log=self._log))

    def take(self, plan_json: str) -> WarmProcess:
        """One for a run of this plan: another run's, if one is idle, or a new one. It says when it is warm."""
        self._idle.sort(key=lambda process: process.is_warm)
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                process.adopt(plan_json)
                return process
            process.kill()
        return WarmProcess(plan_json, log=self._log)

    def give_back(self, process: WarmProcess) -> None:
        """A run is over that used it, and none of its ranks is left."""
        self._idle.append(process)

    def close(self) -> None:
        """End those that nobody uses."""
        while self._idle:
            self._idle.pop().kill()


def _memory_of(text: str) -> int:
    fd = os.memfd_create("forge-text")
    os.write(fd, text.encode())
    return fd
