"""Run the server of `forge ui` until it is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from forge.errors import ArgumentError

_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client")
_MAX_CONNECTIONS = 512
_MAX_PER_CLIENT = 256
_GRACE_S = 1


def require_packages() -> None:
    """Raises: ArgumentError if the packages of the extra `serve` are missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ArgumentError(f"forge ui needs {', '.join(missing)}: pip install 'forge-train[serve]'")


def serve(
    listener: socket.socket,
    root: Path,
    *,
    host: str,
    token: str | None,
    more_hosts: tuple[str, ...] = (),
    cluster: str | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve the pages until SIGINT or SIGTERM.

    Args:
        listener: a bound socket.
        root: the folder of the runs.
        token: None: none is needed.
        on_ready: called once browsers can connect.

    Raises: ArgumentError if the token is missing or short, or the cluster is not known.
    """
    import uvicorn

    from forge.serve.http.connection import ConnectionLimit, LimitedConnection
    from forge.serve.http.telemetry import Telemetry
    from forge.ui.access import token_access
    from forge.ui.app import build_app
    from forge.ui.run_list import RunList

    access = token_access(host, listener.getsockname()[1], token=token, more_hosts=more_hosts)
    runs = RunList(root, cluster=cluster)
    threading.Thread(target=runs.refresh, kwargs={"whole": True}, daemon=True).start()
    limit = ConnectionLimit(
        most=_MAX_CONNECTIONS, most_per_client=_MAX_PER_CLIENT, telemetry=Telemetry(usd_per_hour=None)
    )
    config = uvicorn.Config(
        build_app(runs, access=access),
        http=LimitedConnection.within(limit),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=tls_cert,
        ssl_keyfile=None if tls_key is None else str(tls_key),
    )

    class Server(uvicorn.Server):
        """Leaves signals to this function."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    server = Server(config)

    async def run() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
        listener.listen(config.backlog)
        on_ready()
        await server.serve(sockets=[listener])

    asyncio.run(run())
