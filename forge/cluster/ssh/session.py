"""One machine, reached by OpenSSH: commands, a forwarded port, a shell.

The user's own client does it, with its configuration, agent and keys. A machine's key is learnt when it is
first seen, into a file of the cluster's own, and held against it from then on.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from forge.cluster.base import stdin_arguments
from forge.errors import ClusterError
from forge.process import free_port

_CONNECT_TIMEOUT_S = 10
_FORWARD_TIMEOUT_S = 20.0
_POLL_S = 0.02
_ENDS_WITH_US = """\
( while test $PPID != 1 -a -d /proc/$PPID; do sleep 0.2; done
kill -s TERM -- -$$ ) </dev/null >/dev/null 2>&1 & watch=$!
{line}
code=$?; kill $watch; exit $code"""
"""OpenSSH's server gives a command without a terminal a session of its own, and lets it run on when the connection
is gone: so it has a watch, which ends the session's group when the server's process for it is no more."""
_OPENSSH_FAILED = 255
"""The exit status by which ssh says that it, and not the command, has failed. Source: ssh(1), EXIT STATUS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SshHost:
    """Where it is, and who may enter."""

    host: str
    known_hosts: Path
    user: str | None = None
    port: int = 22
    identity_file: str | None = None

    def ssh(self, *options: str) -> list[str]:
        """The command that opens a shell there; what is to run instead follows it."""
        command = [
            *("ssh", "-p", str(self.port)),
            *("-o", f"ConnectTimeout={_CONNECT_TIMEOUT_S}", "-o", "LogLevel=ERROR"),
            *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
            *("-o", "StrictHostKeyChecking=accept-new", "-o", f"UserKnownHostsFile={self.known_hosts}"),
        ]
        if self.identity_file is not None:
            command += ["-i", str(Path(self.identity_file).expanduser()), "-o", "IdentitiesOnly=yes"]
        if self.user is not None:
            command += ["-l", self.user]
        return [*command, *options, self.host]

    def run(
        self,
        command: Sequence[str] | str,
        *,
        stdin: bytes | IO[bytes] = b"",
        timeout_s: float = 60.0,
        ends_with_us: bool = False,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command there, or a line for its shell; how it went is the caller's to judge.

        Args:
            ends_with_us: Where this process ends, takes too long or is interrupted, the command ends as well.

        Raises: ClusterError if the machine is not reached, does not let us in, or takes too long.
        """
        line = command if isinstance(command, str) else shlex.join(command)
        if ends_with_us:
            line = _ENDS_WITH_US.format(line=line)
        ssh = [*self.ssh("-T", "-o", "BatchMode=yes"), line]
        try:
            done = _run(ssh, stdin_arguments(stdin), timeout_s=timeout_s)
        except FileNotFoundError:
            raise ClusterError("there is no ssh on this machine; install OpenSSH's client") from None
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{self.host} did not answer within {timeout_s:.0f} s; try it by hand: {shlex.join(self.ssh())}"
            ) from None
        if done.returncode < 0:
            raise ClusterError(f"{self.host} was given up: ssh was ended by signal {-done.returncode}")
        if done.returncode == _OPENSSH_FAILED:
            raise self._refusal(done.stderr.decode(errors="replace"))
        return done

    @contextlib.contextmanager
    def forward(self, port: int) -> Iterator[int]:
        """A port of this machine's loopback that leads to a port of that machine's loopback, while it is open.

        Raises: ClusterError as `run` does, or if nothing listens at the other end in time.
        """
        local = free_port("127.0.0.1")
        options = ("-N", "-T", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes")
        ssh = self.ssh(*options, "-L", f"127.0.0.1:{local}:127.0.0.1:{port}")
        with subprocess.Popen(
            ssh, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as tunnel:
            try:
                self._await(tunnel, local)
                yield local
            finally:
                tunnel.terminate()

    def _await(self, tunnel: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + _FORWARD_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return
            if tunnel.poll() is not None:
                assert tunnel.stderr is not None
                raise self._refusal(tunnel.stderr.read().decode(errors="replace"))
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.host} did not open a port within {_FORWARD_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def _refusal(self, words: str) -> ClusterError:
        """What OpenSSH's last words mean, and what to do about it."""
        last = next((line.strip() for line in reversed(words.splitlines()) if line.strip()), "it did not say why")
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in words or "Host key verification failed" in words:
            name = self.host if self.port == 22 else f"[{self.host}]:{self.port}"
            return ClusterError(
                f"{self.host} shows another key than before: another machine, or one that was set up anew. If it "
                f"was: ssh-keygen -R {shlex.quote(name)} -f {shlex.quote(str(self.known_hosts))}"
            )
        by_hand = f"try it by hand: {shlex.join(self.ssh())}"
        if "UNPROTECTED PRIVATE KEY FILE" in words:
            key = self.identity_file or "a key of yours"
            mend = f"chmod 600 {shlex.quote(self.identity_file)}" if self.identity_file else "chmod 600 it"
            return ClusterError(f"{key} can be read by others, and OpenSSH does not use it then: {mend}")
        if "Permission denied" in words or "Too many authentication failures" in words:
            if self.identity_file is not None and not Path(self.identity_file).expanduser().is_file():
                return ClusterError(
                    f"{self.host} does not let {self.user or 'you'} in: there is no key {self.identity_file} here; "
                    "name another: identity_file in the cluster's file"
                )
            key = f"the key {self.identity_file}" if self.identity_file else "any key of yours"
            return ClusterError(f"{self.host} does not let {self.user or 'you'} in with {key}: {last}; {by_hand}")
        if "Could not resolve hostname" in words:
            return ClusterError(
                f"{self.host} cannot be reached: {last}; correct it under machines in the cluster's file, or have "
                f"the name known here (getent hosts {self.host})"
            )
        if "Connection refused" in words:
            return ClusterError(
                f"{self.host} cannot be reached: {last}; start its sshd (systemctl start ssh), or correct port in "
                "the cluster's file"
            )
        return ClusterError(f"{self.host} cannot be reached: {last}; {by_hand}")


def cancel_all() -> None:
    """End every ssh whose command this process waits for, in any thread."""
    for ssh in list(_awaited):
        ssh.terminate()


_awaited: set[subprocess.Popen[bytes]] = set()


def _run(
    command: Sequence[str], stdin: Mapping[str, Any], *, timeout_s: float
) -> subprocess.CompletedProcess[bytes]:
    """As `subprocess.run` does, but so that `cancel_all` ends it."""
    said = stdin.get("input")
    source = subprocess.PIPE if said is not None else stdin["stdin"]
    with subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ssh:
        _awaited.add(ssh)
        try:
            out, err = ssh.communicate(said, timeout=timeout_s)
        except BaseException:
            ssh.kill()
            raise
        finally:
            _awaited.discard(ssh)
    return subprocess.CompletedProcess(ssh.args, ssh.returncode, out, err)
