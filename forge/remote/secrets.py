"""Pass the secrets of a run from an ssh command on the head to the driver, without a file.

They come from the client's environment and go into the environment of the run's processes. In between, a small
process on the head keeps them in memory for at most ten minutes, behind an abstract Unix socket, until the driver
takes them. Both ends must belong to the same user.
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

_STASH_S = 600.0
_TIMEOUT_S = 10.0


def stash_secrets(name: str, values: Mapping[str, str]) -> None:
    """Keep values in the memory of a child process until `take_secrets` is called, for ten minutes at most.

    Returns once they can be taken.

    Raises: RunError if values are already stashed under that name.
    """
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(_address(name))
    except OSError as error:
        raise RunError(
            f"credentials for {name} are already staged on the head ({error.strerror}); "
            "another forge train for it may be starting"
        ) from error
    server.listen(1)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        server.close()
        return
    try:
        os.setsid()
        # Close every inherited file, so that a reader of this command's output does not wait for this process.
        os.closerange(0, server.fileno())
        os.closerange(server.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        _serve(server, json.dumps(dict(values)).encode())
    finally:
        os._exit(0)


def take_secrets(name: str) -> dict[str, str]:
    """Take the values stashed under a name, once; empty if there are none.

    Raises: RunError if another user stashed them.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_TIMEOUT_S)
        try:
            client.connect(_address(name))
        except OSError:
            return {}
        if _user_of(client) != os.getuid():
            raise RunError(f"credentials for {name} were staged by another user of this machine; not using them")
        try:
            with client.makefile("rb") as stream:
                values: dict[str, str] = json.loads(stream.read() or b"{}")
        except ConnectionResetError:  # it has already served another process
            return {}
        return values


def _serve(server: socket.socket, content: bytes) -> None:
    deadline = time.monotonic() + _STASH_S
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        client, _ = server.accept()
        with client:
            if _user_of(client) == os.getuid():
                client.settimeout(_TIMEOUT_S)
                client.sendall(content)
                return


def _user_of(peer: socket.socket) -> int:
    """Return the user id of the peer process. Source: unix(7), SO_PEERCRED."""
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


def _address(name: str) -> str:
    """Return an address in the abstract namespace, which has no file and disappears with its process."""
    return f"\0forge-{os.getuid()}-{name}"
