"""`ray start` on a node whose head may still be starting: imports Ray while it waits for the head's port.

python -m forge.cluster.ssh.wait_and_join HOST:PORT start ...
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time

_TIMEOUT_S = 60.0
_POLL_S = 0.05


def main() -> None:
    """Wait for the port, then run Ray's command line with the other arguments."""
    host, _, port = sys.argv.pop(1).rpartition(":")
    from ray.scripts.scripts import main as ray

    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1.0):
            break
        if time.monotonic() > deadline:
            sys.exit(f"the head did not open its port {host}:{port} within {_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
    ray()


if __name__ == "__main__":
    main()
