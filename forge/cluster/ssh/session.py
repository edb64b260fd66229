"""One host reached by OpenSSH: run a command, forward a port, open a shell.

forge runs the user's own ssh, with its configuration, agent and keys. At the first connection a host's key is
stored in a file of the cluster; later connections must have the same key. All commands share one connection.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from forge.cluster.base import stdin_arguments
from forge.cluster.ssh.connection import (
    OPENSSH_FAILED,
    ConnectionCancelledError,
    ConnectionFailedError,
    SharedConnection,
    close_connections,
    shared_connection,
)
from forge.cluster.ssh.login_shell import after_marker, make_marker, wrap_line
from forge.cluster.tunnel import local_port, private_folder
from forge.errors import ClusterError

_CONNECT_TIMEOUT_S = 10
_FORWARD_TIMEOUT_S = 20.0
_CONTROL_TIMEOUT_S = 5.0
_POLL_S = 0.02
_KILL_ON_DISCONNECT = """\
( while test $PPID != 1 -a -d /proc/$PPID; do sleep 0.2; done
kill -s TERM -- -$$ ) </dev/null >/dev/null 2>&1 & watch=$!
( {line}
)
code=$?; kill $watch; exit $code"""
"""sshd runs a command without a terminal in its own session and leaves it running when the connection is lost. So
this watcher ends the session's process group when the sshd process of the connection has gone. The command may exit
its shell, or replace it: the watcher ends all the same, while the connection goes on."""
_BATCH = ("-o", "BatchMode=yes")
_FORWARDS = ("-o", "ClearAllForwardings=no")
"""Whatever the user's configuration says: forge forwards its own port only."""
_NO_SSH = "ssh is not installed on this machine; install OpenSSH's client"


@dataclass(frozen=True, slots=True, kw_only=True)
class SshHost:
    """A host and how to log in to it."""

    host: str
    known_hosts: Path
    user: str | None = None
    port: int = 22
    identity_file: str | None = None

    def ssh(self, *options: str) -> list[str]:
        """The command that opens a shell there; append a command to run that instead."""
        command = [
            *("ssh", "-p", str(self.port)),
            *("-o", f"ConnectTimeout={_CONNECT_TIMEOUT_S}", "-o", "LogLevel=ERROR"),
            *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
            *("-o", "StrictHostKeyChecking=accept-new", "-o", _path_option("UserKnownHostsFile", self.known_hosts)),
        ]
        if self.identity_file is not None:
            key = _path_option("IdentityFile", Path(self.identity_file).expanduser())
            command += ["-o", key, "-o", "IdentitiesOnly=yes"]
        if self.user is not None:
            command += ["-l", self.user]
        return [*command, *options, self.host]

    def ssh_through(self, gateway: SshHost) -> list[str]:
        """The command that opens a shell there by way of another host."""
        *options, host = gateway.ssh()
        words = [word.replace("%", "%%") for word in options]  # ssh replaces %h and %p of the line
        return self.ssh("-o", f"ProxyCommand={shlex.join(words)} -W '[%h]:%p' {shlex.quote(host)}")

    def run(
        self,
        command: Sequence[str] | str,
        *,
        stdin: bytes | IO[bytes] = b"",
        timeout_s: float = 60.0,
        kill_on_disconnect: bool = False,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command, or a line for `sh` there, and return its result, whatever its exit code.

        The user may have another login shell, whose start-up files may print: see `forge.cluster.ssh.login_shell`.

        Args:
            kill_on_disconnect: end the command there if this process ends, times out or is interrupted.

        Raises: ClusterError if the host is not reached, refuses the login or the command, or takes too long.
        """
        line = command if isinstance(command, str) else shlex.join(command)
        if kill_on_disconnect:
            line = _KILL_ON_DISCONNECT.format(line=line)
        marker, deadline = make_marker(), time.monotonic() + timeout_s
        try:
            options = self._connection.options(timeout_s=timeout_s)
            ssh = [*self.ssh("-T", *_BATCH, *options), wrap_line(line, marker=marker)]
            done = _run(ssh, stdin_arguments(stdin), timeout_s=max(0.0, deadline - time.monotonic()))
        except ConnectionFailedError as error:
            raise self._explain(error.stderr.decode(errors="replace")) from None
        except FileNotFoundError:
            raise ClusterError(_NO_SSH) from None
        except (_CancelledError, ConnectionCancelledError):
            raise ClusterError(f"{self.host} was cancelled") from None
        except BaseException as error:
            if kill_on_disconnect:
                self._connection.close()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise ClusterError(
                f"{self.host} did not answer within {timeout_s:.0f} s; try it by hand: {shlex.join(self.ssh())}"
            ) from None
        if done.returncode < 0:
            raise ClusterError(f"{self.host} was cancelled: ssh was ended by signal {-done.returncode}")
        if done.returncode == OPENSSH_FAILED:
            reason = after_marker(done.stderr, marker=marker)
            if reason is not None:  # it has begun
                text = reason.decode(errors="replace").strip()
                raise ClusterError(f"{self.host} was lost while a command ran there{': ' * bool(text)}{text}")
            raise self._explain(done.stderr.decode(errors="replace"))
        return self._without_start_up_text(done, marker=marker)

    def _without_start_up_text(
        self, done: subprocess.CompletedProcess[bytes], *, marker: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Raises: ClusterError if the login shell ended before it ran the command."""
        out, err = (after_marker(output, marker=marker) for output in (done.stdout, done.stderr))
        if out is None:  # the output is not shown: another shell may have echoed the input, which can have secrets
            raise ClusterError(
                f"{self.host}: the login shell there ended with {done.returncode} and did not run forge's command; "
                f"it must be a shell, and its start-up files must neither exit nor start another one: "
                f"{shlex.join([*self.ssh(), 'echo works'])}"
            )
        return subprocess.CompletedProcess(done.args, done.returncode, out, done.stderr if err is None else err)

    @property
    def _connection(self) -> SharedConnection:
        return shared_connection(self.ssh("-T", *_BATCH))

    @contextlib.contextmanager
    def forward(self, port: int, *, local: int = 0) -> Iterator[int]:
        """Forward a port of this machine's loopback to a port of the host's loopback; yields the local port.

        ssh itself forwards a Unix socket that only this user can reach: see `forge.cluster.tunnel`.

        Args:
            local: the port of this machine; 0: a free one.

        Raises: ClusterError as `run`, or if ssh does not forward in time.
        """
        with private_folder() as folder:
            path = folder / "port"
            with (
                self._forwarded(path, port),
                local_port(lambda: _connect_unix(path), port=local) as listening,
            ):
                yield listening

    @contextlib.contextmanager
    def _forwarded(self, path: Path, port: int) -> Iterator[None]:
        """Forward a Unix socket to a port of the host: on the shared connection, or by a process of its own."""
        try:
            shared = self._connection.options(timeout_s=_FORWARD_TIMEOUT_S)
        except ConnectionFailedError as error:
            raise self._explain(error.stderr.decode(errors="replace")) from None
        except ConnectionCancelledError:
            raise ClusterError(f"{self.host} was cancelled") from None
        except FileNotFoundError:
            raise ClusterError(_NO_SSH) from None
        except subprocess.TimeoutExpired:
            raise self._no_forward() from None
        rule = f"{path}:127.0.0.1:{port}"
        control = self.ssh(*shared, *_FORWARDS, "-L", rule, "-O")
        if shared and _is_done([*control[:-1], "forward", control[-1]]) and path.is_socket():
            try:
                yield
            finally:
                _is_done([*control[:-1], "cancel", control[-1]])
            return
        ssh = self.ssh("-N", "-T", *_BATCH, *_FORWARDS, "-o", "ExitOnForwardFailure=yes", "-L", rule)
        with subprocess.Popen(
            ssh, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as tunnel:
            try:
                self._await_forward(tunnel, path)
                yield
            finally:
                tunnel.terminate()

    def _await_forward(self, tunnel: subprocess.Popen[bytes], path: Path) -> None:
        deadline = time.monotonic() + _FORWARD_TIMEOUT_S
        while True:
            if path.is_socket():
                return
            if tunnel.poll() is not None:
                assert tunnel.stderr is not None
                raise self._explain(tunnel.stderr.read().decode(errors="replace"))
            if time.monotonic() > deadline:
                raise self._no_forward()
            time.sleep(_POLL_S)

    def _no_forward(self) -> ClusterError:
        return ClusterError(f"{self.host} did not forward a port within {_FORWARD_TIMEOUT_S:.0f} s")

    def _explain(self, stderr: str) -> ClusterError:
        """Explain OpenSSH's error and what to do about it."""
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else "no error message"
        by_hand = f"try it by hand: {shlex.join(self.ssh())}"
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in stderr or "Host key verification failed" in stderr:
            name = self.host if self.port == 22 else f"[{self.host}]:{self.port}"
            return ClusterError(
                f"{self.host} has another key than before: it is another machine, or was reinstalled. If it was "
                f"reinstalled: ssh-keygen -R {shlex.quote(name)} -f {shlex.quote(str(self.known_hosts))}"
            )
        if "UNPROTECTED PRIVATE KEY FILE" in stderr:
            key = self.identity_file or "your key"
            fix = f"chmod 600 {shlex.quote(self.identity_file)}" if self.identity_file else "chmod 600 it"
            return ClusterError(f"{key} can be read by other users, so OpenSSH does not use it: {fix}")
        if "Permission denied" in stderr or "Too many authentication failures" in stderr:
            return self._explain_login(last)
        if "Could not resolve hostname" in stderr:
            return ClusterError(
                f"{self.host} cannot be reached: {last}; correct it under machines in the cluster's file, or add "
                f"the name to this machine's resolver (getent hosts {self.host})"
            )
        if "Connection refused" in stderr:
            return ClusterError(
                f"{self.host} cannot be reached: {last}; start its sshd (systemctl start ssh), or correct port in "
                "the cluster's file"
            )
        return ClusterError(f"{self.host} cannot be reached: {last}; {by_hand}")

    def _explain_login(self, last: str) -> ClusterError:
        login = f"{self.user}@{self.host}" if self.user else self.host
        if self.identity_file is not None and not Path(self.identity_file).expanduser().is_file():
            return ClusterError(
                f"SSH authentication to {login} failed: the key {self.identity_file} does not exist here; "
                "correct identity_file in the cluster's file"
            )
        key = f"the key {self.identity_file}" if self.identity_file else "any of your keys"
        return ClusterError(
            f"SSH authentication to {login} failed with {key}: {last}; try it by hand: {shlex.join(self.ssh())}"
        )


def cancel_all(*, wait: bool = True) -> None:
    """End every ssh command that a thread of this process waits for, and their connections.

    Args:
        wait: until the connections are closed.
    """
    _cancelled.update(_running)
    for ssh in list(_running):
        ssh.terminate()
    if wait:
        close_connections()
    else:
        threading.Thread(target=close_connections, daemon=True).start()


def _path_option(name: str, path: Path) -> str:
    """Return an option of ssh with a path as its only value.

    ssh splits the value at blanks unless it is quoted, and replaces `%h` and the like. Source: ssh_config(5).

    Raises: ClusterError if ssh cannot be given the path.
    """
    text = str(path)
    if "${" in text or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ClusterError(
            f"ssh cannot use the path {text!r}: it contains a control character, or '${{', which ssh would "
            "replace; choose another: FORGE_STATE, or identity_file in the cluster's file"
        )
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'{name}="{quoted}"'


def _is_done(command: Sequence[str]) -> bool:
    """Run a command for the process of the shared connection. Returns: whether it has carried it out."""
    try:
        return _run(command, stdin_arguments(b""), timeout_s=_CONTROL_TIMEOUT_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired, _CancelledError):
        return False


def _connect_unix(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
        return connection
    except BaseException:
        connection.close()
        raise


class _CancelledError(Exception):
    """`cancel_all` has ended a command."""


_running: set[subprocess.Popen[bytes]] = set()
_cancelled: set[subprocess.Popen[bytes]] = set()


def _run(
    command: Sequence[str], stdin: Mapping[str, Any], *, timeout_s: float
) -> subprocess.CompletedProcess[bytes]:
    """Like `subprocess.run`, but `cancel_all` can end it.

    Raises: _CancelledError if it did, and what `subprocess.run` raises.
    """
    text = stdin.get("input")
    source = subprocess.PIPE if text is not None else stdin["stdin"]
    with subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ssh:
        _running.add(ssh)
        try:
            out, err = ssh.communicate(text, timeout=timeout_s)
        except BaseException:
            ssh.kill()
            raise
        finally:
            _running.discard(ssh)
            is_cancelled = ssh in _cancelled
            _cancelled.discard(ssh)
    if is_cancelled:
        raise _CancelledError
    return subprocess.CompletedProcess(ssh.args, ssh.returncode, out, err)
