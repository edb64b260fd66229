"""Processes on one node that wait, each with a CUDA context, to become the ranks of the next generation.

They are forked while the current generation trains, after its ranks have loaded their state, so that a change of
the membership costs no context start. Each holds the memory of one more context on its GPU (see
docs/gpu.md). Without a ready one a rank is forked when it is needed, as on CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forge.elastic.workers.fork_client import ForkServer, memory_of
from forge.process import is_alive

MAX_MESSAGE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyProcess:
    """A standby process whose device is ready."""

    pid: int
    socket: socket.socket
    """It becomes the agent's connection to the rank."""

    def start(self, spec: dict[str, Any], *, fds: list[int]) -> None:
        """Make it the rank of a launch spec, which inherits the file descriptors."""
        text = memory_of(json.dumps(spec))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; its end is being reported
            socket.send_fds(self.socket, [b"start"], [text, *fds])
        os.close(text)


class StandbyProcesses:
    """The standby processes of one node, by the number of their GPU."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[tuple[str, ...], socket.socket]] = {}

    def prepare(self, number: int, *, device: str, gpus: Sequence[str], fork_server: ForkServer) -> None:
        """Fork one for a GPU, unless there is one.

        Args:
            number: of the GPU among `gpus`, those of the run on this node.
            device: its name in the process.
        """
        key = tuple(gpus)
        if number in self._waiting and self._waiting[number][0] == key:
            return
        self._end(number)
        ours, theirs = connect_rank()
        fork_server.fork_standby({"device": device, "gpus": key}, fd=theirs.fileno())
        theirs.close()
        self._waiting[number] = key, ours

    def take(self, number: int, *, gpus: Sequence[str]) -> ReadyProcess | None:
        """Return the one for a GPU if it is ready; otherwise end it."""
        key, ours = self._waiting.pop(number, ((), None))
        if ours is None:
            return None
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            text = ours.recv(16)
            if text and key == tuple(gpus) and is_alive(int(text)):
                return ReadyProcess(pid=int(text), socket=ours)
        ours.close()
        return None

    def close(self) -> None:
        """End all of them."""
        for number in list(self._waiting):
            self._end(number)

    def _end(self, number: int) -> None:
        """End one: its socket closes, and it exits, or exits when it has created its context."""
        if number in self._waiting:
            self._waiting.pop(number)[1].close()


def connect_rank() -> tuple[socket.socket, socket.socket]:
    """Connect an agent with one of its ranks. Returns: the agent's end and the rank's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE_BYTES)
    return ours, theirs
