"""What the agent knows of a fork server from its messages; the real processes are in test_fork_server."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys

from forge.elastic.workers.fork_client import ForkServer


def test_receive__clone_whose_rank_has_ended__the_clone_is_still_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as rank:
        rank.wait()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    clone = ForkServer(ours, None)
    for message in (
        {"ready": 0.1, "epoch": 0, "pid": os.getpid()},
        {"forked": 0, "generation": 1, "pid": rank.pid},
    ):
        theirs.send(json.dumps(message).encode())

    async def receive_both() -> None:
        for _ in range(2):
            assert await clone.receive()

    asyncio.run(receive_both())
    assert clone.is_ready
    assert clone.is_alive
    ours.close()
    theirs.close()
