"""Loopback ports of this machine that lead to a cluster's job server, safe from other users of this machine.

Ray's token is sent to such a port, so it must not be one that another user's process listens on. A port is free for
everyone from the moment its owner ends or has not bound it yet. So this process listens itself, on a port that it
holds while the tunnel is open, and passes each connection on: to a Unix socket in a folder that only this user can
enter (ssh), or to a port that is checked each time to be the tunnel's own (kubectl, which forwards nothing else).
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from forge.errors import ClusterError

_BUFFER_BYTES = 64 * 2**10
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]{1,50}")
"""Paths that ssh takes as they are, and whose sockets stay below the 104 bytes that a socket's path may have
everywhere: the folder's name and the socket's take 21, and ssh appends 17 while it creates it."""


@contextlib.contextmanager
def local_port(connect: Callable[[], socket.socket], *, port: int = 0) -> Iterator[int]:
    """Listen on a port of loopback and pass every connection on.

    Args:
        connect: opens the connection to pass one on to; if it raises OSError, the accepted one is closed.
        port: of this machine; 0: a free one.

    Raises: ClusterError if the port is taken.
    """
    opened = _OpenSockets()
    try:
        server = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ClusterError(f"port {port} of this machine cannot be listened on: {error.strerror}") from error
    with server:
        threading.Thread(target=_accept, args=(server, connect, opened), daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            _shut_down(server)  # wakes the thread that waits for it
            opened.shut_down()


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Create a folder with a short path that only this user can enter, for the time of the block.

    Raises: ClusterError if it cannot be created.
    """
    try:
        base = tempfile.gettempdir()
        folder = tempfile.mkdtemp(prefix="forge-", dir=base if _PLAIN_PATH.fullmatch(base) else "/tmp")
    except OSError as error:
        raise ClusterError(f"no folder for the tunnel's socket can be created: {error}") from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def listens(processes: Iterable[psutil.Process], *, port: int) -> bool:
    """Whether one of these processes listens on a port of this machine's loopback."""
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            for connection in process.net_connections(kind="tcp4"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


class _OpenSockets:
    """The sockets of the connections that are being passed on; safe to use from several threads."""

    def __init__(self) -> None:
        self._sockets: set[socket.socket] = set()
        self._is_shut_down = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def holding(self, end: socket.socket) -> Iterator[None]:
        """Hold a socket for the time of the block; after `shut_down` it is shut down at once."""
        with self._lock:
            self._sockets.add(end)
            if self._is_shut_down:
                _shut_down(end)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(end)

    def shut_down(self) -> None:
        """Shut down every socket held now or later: wakes the threads that wait for them."""
        with self._lock:
            self._is_shut_down = True
            for end in self._sockets:
                _shut_down(end)


def _accept(server: socket.socket, connect: Callable[[], socket.socket], opened: _OpenSockets) -> None:
    with contextlib.suppress(OSError):  # the server was shut down
        while True:
            near, _ = server.accept()
            threading.Thread(target=_pass_on, args=(near, connect, opened), daemon=True).start()


def _pass_on(near: socket.socket, connect: Callable[[], socket.socket], opened: _OpenSockets) -> None:
    """Open the other connection, and copy bytes both ways until both directions have ended."""
    with near, contextlib.suppress(OSError), opened.holding(near), connect() as far, opened.holding(far):
        back = threading.Thread(target=_copy, args=(far, near), daemon=True)
        back.start()
        _copy(near, far)
        back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(_BUFFER_BYTES):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # one end is gone: end the other direction too
        _shut_down(source)
        _shut_down(sink)


def _shut_down(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
