"""Secrets of whoever asks for a run: which they are, how they get to the machines, how they stay out of files.

They come from the environment and go into the environment, of the processes of that run alone. On the way they
lie in memory only: a small process on the head keeps them for a few minutes behind a socket that has no file,
until the process that carries the run asks. Whoever listens and whoever asks must be the same user.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping

from forge.errors import RunError

_LENT_FOR_S = 600.0
_PATIENCE_S = 10.0


def stash_secrets(name: str, values: Mapping[str, str]) -> None:
    """Keep values in the memory of a process of its own until `take_secrets` asks, for ten minutes at most.

    Returns when they can be borrowed.

    Raises: RunError if they are lent already.
    """
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(_address(name))
    except OSError as error:
        raise RunError(f"what {name} needs is being lent already: {error.strerror}") from error
    server.listen(1)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        server.close()
        return
    try:
        os.setsid()
        # Whoever waits for the end of this command's output must not wait for this process.
        os.closerange(0, server.fileno())
        os.closerange(server.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        _serve(server, json.dumps(dict(values)).encode())
    finally:
        os._exit(0)


def take_secrets(name: str) -> dict[str, str]:
    """What was lent under a name; nothing if nothing was. Raises: RunError if another user lends it."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_PATIENCE_S)
        try:
            client.connect(_address(name))
        except OSError:
            return {}
        if _user_of(client) != os.getuid():
            raise RunError(f"what {name} needs is lent by another user of this machine, and not taken")
        try:
            with client.makefile("rb") as stream:
                values: dict[str, str] = json.loads(stream.read() or b"{}")
        except ConnectionResetError:  # it has served another, and ended
            return {}
        return values


def _serve(server: socket.socket, content: bytes) -> None:
    deadline = time.monotonic() + _LENT_FOR_S
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        client, _ = server.accept()
        with client:
            if _user_of(client) == os.getuid():
                client.settimeout(_PATIENCE_S)
                client.sendall(content)
                return


def _user_of(peer: socket.socket) -> int:
    """The user at the other end. Source: unix(7), SO_PEERCRED."""
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


def _address(name: str) -> str:
    """In the abstract namespace: no file, gone with its process."""
    return f"\0forge-{os.getuid()}-{name}"
