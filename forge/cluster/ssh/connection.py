"""One connection to each host for all ssh commands of this process: OpenSSH's multiplexing (`ssh -M`).

Another command on a connection that is open takes a third of the time of a new connection, and a forwarded port a
fortieth; over a network with long round trips the difference is larger. The process that holds a connection runs
`cat` on the host, which ends at the end of its input: if this process is killed, its connections end with the last
command on them.

Where ssh cannot share a connection (another program of that name, a server that allows one session), each command
opens its own, as before.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from forge.cluster.tunnel import private_folder

# Ctrl-C reaches all processes of a terminal; this one ends what it has begun first. A lost terminal ends ssh too.
_WITHOUT_CTRL_C = ("sh", "-c", "trap '' INT QUIT; exec \"$@\"", "sh")
# In any login shell. It prints after ssh has opened the socket, if ssh opens one.
_HOLD = "echo started; exec cat >/dev/null"
_ANSWER_BYTES = 64
_POLL_MS = 10
# Each takes a process and two descriptors; commands on further hosts have connections of their own.
_MAX_SHARED = 64
_CLOSE_TIMEOUT_S = 2.0
_ERROR_BYTES = 64 * 2**10
OPENSSH_FAILED = 255
"""The exit status if ssh itself failed rather than the command. Source: ssh(1), EXIT STATUS."""


class ConnectionFailedError(Exception):
    """ssh could not connect, or not log in."""

    def __init__(self, stderr: bytes) -> None:
        super().__init__(stderr)
        self.stderr = stderr


class ConnectionCancelledError(Exception):
    """The connection was closed by another thread while it was opened."""


class SharedConnection:
    """The connection to one host: opened when it is first needed, and again after it was lost."""

    def __init__(self, ssh: Sequence[str]) -> None:
        """Args: ssh: the command that opens a shell there."""
        self._ssh = ssh
        self._lock = threading.Lock()
        self._folder = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._path: Path | None = None
        self._is_possible = True
        self._cancelled: subprocess.Popen[bytes] | None = None

    def options(self, *, timeout_s: float) -> list[str]:
        """Return the options by which ssh uses the connection; none if it cannot be shared.

        Raises: ConnectionFailedError; ConnectionCancelledError; TimeoutExpired of subprocess if the host does not
            answer in time; FileNotFoundError if ssh is not installed; ClusterError if there is no folder for the
            socket.
        """
        deadline = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=timeout_s):  # another thread waits for the host
            raise subprocess.TimeoutExpired(self._ssh, timeout_s)
        try:
            if not self._is_possible or (self._process is None and _num_open() >= _MAX_SHARED):
                return []
            is_open = self._process is not None and self._process.poll() is None
            if not is_open or self._path is None or not self._path.is_socket():
                self._close()
                self._open(max(0.0, deadline - time.monotonic()))
            return ["-S", str(self._path), "-o", "ControlMaster=no"] if self._is_possible else []
        finally:
            self._lock.release()

    @property
    def is_open(self) -> bool:
        """Whether it has a process."""
        return self._process is not None

    def close(self) -> None:
        """End the connection, and the commands that use it."""
        process = self._process
        if process is not None:
            self._cancelled = process
            with contextlib.suppress(OSError):
                process.terminate()  # not under the lock, which a thread holds that waits for the host
        with self._lock:
            self._close()

    def _open(self, timeout_s: float) -> None:
        if shutil.which(self._ssh[0]) is None:
            raise FileNotFoundError(self._ssh[0])
        folder = self._folder.enter_context(private_folder())
        self._path = folder / "ssh"
        options = ("-M", "-S", str(self._path), "-o", "ControlPersist=no")
        command = [*_WITHOUT_CTRL_C, *self._ssh[:-1], *options, self._ssh[-1], _HOLD]
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            try:
                is_open = self._wait_open(timeout_s)
            except BaseException:
                self._close()
                raise
            if is_open:
                return
            code, is_cancelled = self._process.poll(), self._process is self._cancelled
            errors.seek(0)
            self._close()
            if is_cancelled:
                raise ConnectionCancelledError
            if code == OPENSSH_FAILED:
                raise ConnectionFailedError(errors.read(_ERROR_BYTES))
            if code is not None and code < 0:
                raise ConnectionFailedError(f"ssh was ended by signal {-code}".encode())
            self._is_possible = False

    def _wait_open(self, timeout_s: float) -> bool:
        """Wait until the connection can be used. Returns: whether it can."""
        assert self._process is not None and self._process.stdout is not None and self._path is not None
        deadline = time.monotonic() + timeout_s
        output = select.poll()
        output.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        while not self._path.is_socket():
            if output.poll(_POLL_MS):  # it has started, or ended
                is_over = not os.read(self._process.stdout.fileno(), _ANSWER_BYTES)
                if is_over:
                    self._process.wait()
                return self._path.is_socket() and not is_over
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self._process.args, timeout_s)
        return True

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_TIMEOUT_S)
            if process.poll() is None:
                process.kill()
                process.wait()
        self._folder.close()


_connections: dict[tuple[str, ...], SharedConnection] = {}
_guard = threading.Lock()


def shared_connection(ssh: Sequence[str]) -> SharedConnection:
    """Return this process's connection for the command that opens a shell on a host."""
    with _guard:
        return _connections.setdefault(tuple(ssh), SharedConnection(ssh))


def _num_open() -> int:
    return sum(connection.is_open for connection in list(_connections.values()))


def close_connections() -> None:
    """End all of them, and the commands that use them."""
    with _guard:
        connections = list(_connections.values())
    for connection in connections:
        connection.close()


atexit.register(close_connections)
os.register_at_fork(after_in_child=_connections.clear)  # they are the parent's
