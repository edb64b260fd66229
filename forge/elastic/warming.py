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
        self.is_warm = False

    async def receive(self) -> dict[str, Any] | None:
        """What it says; None when it is gone."""
        try:
            text = await asyncio.get_running_loop().sock_recv(self._socket, 2**16)
        except OSError:
            return None
        message: dict[str, Any] | None = json.loads(text) if text else None
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


def _memory_of(text: str) -> int:
    fd = os.memfd_create("forge-text")
    os.write(fd, text.encode())
    return fd
