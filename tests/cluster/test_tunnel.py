"""Tunnels: bytes arrive, and the cluster's token goes to no port that another process has taken."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forge.cluster.dashboard import ray_runs
from forge.cluster.kubernetes.kubectl import Kubectl
from forge.cluster.ssh.session import SshHost
from forge.cluster.tunnel import listens, local_port, private_folder
from forge.errors import ClusterError
from tests.support.command import wait_for

TOKEN = "THE-CLUSTERS-TOKEN"


@contextlib.contextmanager
def server(answer: bytes = b"") -> Iterator[tuple[int, list[bytes]]]:
    """A server that keeps what it receives; yields its port."""
    received: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    received.append(connection.recv(4096))
                    connection.sendall(answer or received[-1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], received
        listener.shutdown(socket.SHUT_RDWR)


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def test_local_port__bytes_pass_both_ways_until_closed() -> None:
    with server() as (port, _), local_port(lambda: dial(port)) as local:
        for number in range(3):
            with dial(local) as connection:
                connection.sendall(b"hello %d" % number)
                assert connection.recv(100) == b"hello %d" % number
                assert connection.recv(100) == b""
        kept = dial(local)
    with kept, contextlib.suppress(ConnectionResetError):
        assert kept.recv(100) == b""
    with pytest.raises(OSError, match="refused"):
        dial(local)


def test_local_port__closed_while_a_connection_is_being_passed_on__connection_closed() -> None:
    closing, asked = threading.Event(), threading.Event()
    with server() as (port, _):

        def connect() -> socket.socket:
            asked.set()
            closing.wait(5)
            return dial(port)

        with local_port(connect) as local:
            kept = dial(local)
            assert asked.wait(5)
        closing.set()
        with kept, contextlib.suppress(ConnectionResetError):
            assert kept.recv(100) == b""


def test_local_port__nothing_to_pass_on_to__connection_closed(closed_port: int) -> None:
    with local_port(lambda: dial(closed_port)) as local, dial(local) as connection:
        assert connection.recv(100) == b""


def test_private_folder__only_this_user_enters_it() -> None:
    with private_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a b", "x" * 90, "a:b", "50%", "${HOME}"])
def test_private_folder__odd_folder_for_temporary_files__plain_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    odd = tmp_path / name
    odd.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(odd))
    with private_folder() as folder:
        assert folder.parent == Path("/tmp")


def test_listens__own_port_and_a_strangers__told_apart() -> None:
    with server() as (port, _):
        assert listens([psutil.Process()], port=port)
        with subprocess.Popen(["sleep", "5"]) as other:
            assert not listens([psutil.Process(other.pid)], port=port)
            other.kill()


# ssh


_SSH = f"""#!{sys.executable}
import os, signal, socket, sys, time
if "-M" in sys.argv:
    sys.exit(1)
open(os.environ["WORDS"], "w").write(chr(10).join(sys.argv))
time.sleep(0.3)
forward = sys.argv[sys.argv.index("-L") + 1]
path, _, port = forward.rpartition(":127.0.0.1:")
if not path.startswith("/"):
    sys.exit(255)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
while True:
    near, _ = listener.accept()
    far = socket.create_connection(("127.0.0.1", int(port)))
    far.sendall(near.recv(65536))
    near.sendall(far.recv(65536))
    near.close()
"""
"""Stands in for ssh: forwards like OpenSSH, some time after its command line can be read; shares no connection."""

ANSWER = b'HTTP/1.0 200 OK\r\n\r\n{"data": {"result": {"result": []}}}'


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshHost:
    ssh = tmp_path / "ssh"
    ssh.write_text(_SSH)
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("WORDS", str(tmp_path / "words"))
    return SshHost(host="h", known_hosts=tmp_path / "known_hosts")


def test_forward__another_process_takes_every_port_of_the_command_line__gets_no_token(
    fake_ssh: SshHost, tmp_path: Path
) -> None:
    stolen: list[bytes] = []
    is_over = threading.Event()

    def intrude() -> None:
        """Listen on whatever TCP port of this machine stands on ssh's command line."""
        words = tmp_path / "words"
        while not words.exists() or not words.read_text():
            time.sleep(0.01)
        forward = words.read_text().split("-L\n")[1].splitlines()[0]
        host, _, rest = forward.partition(":")
        if host.startswith("/"):
            return
        with socket.create_server((host, int(rest.partition(":")[0]))) as listener:
            listener.settimeout(5)
            with contextlib.suppress(OSError):
                while not is_over.is_set():
                    connection, _ = listener.accept()
                    with connection:
                        stolen.append(connection.recv(65536))
                        connection.sendall(ANSWER)

    threading.Thread(target=intrude, daemon=True).start()
    with server(ANSWER) as (port, received), fake_ssh.forward(port) as local:
        assert ray_runs(f"http://127.0.0.1:{local}", token=TOKEN) == []
    is_over.set()
    assert stolen == []
    assert TOKEN.encode() in b"".join(received)


def test_forward__ssh_ends_while_in_use__port_stays_ours(fake_ssh: SshHost) -> None:
    with server(ANSWER) as (port, received), fake_ssh.forward(port) as local:
        for child in psutil.Process().children():
            if "-L" in child.cmdline():
                child.kill()
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", local))
        with pytest.raises(ClusterError, match="does not answer"):
            ray_runs(f"http://127.0.0.1:{local}", token=TOKEN)
        assert received == []


# kubectl


_KUBECTL = f"""#!{sys.executable}
import signal, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(f"Forwarding from 127.0.0.1:{{listener.getsockname()[1]}} -> 8265", flush=True)
while True:
    near, _ = listener.accept()
    near.recv(65536)
    near.sendall({ANSWER!r})
    near.close()
"""


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_forward__kubectl_ends_and_another_process_takes_its_port__gets_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_wrapped: bool
) -> None:
    program = tmp_path / ("real" if is_wrapped else "kubectl")
    program.write_text(_KUBECTL)
    program.chmod(0o755)
    if is_wrapped:
        wrapper = tmp_path / "kubectl"
        wrapper.write_text(f'#!/bin/sh\n{program} "$@"\nexit $?\n')
        wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with Kubectl(namespace="n", context=None).forward("pod", 8265) as local:
        assert ray_runs(f"http://127.0.0.1:{local}", token=TOKEN) == []
        child = next(
            process
            for process in psutil.Process().children(recursive=True)
            if any(word.endswith(program.name) for word in process.cmdline()[:2])
        )
        port = next(one.laddr.port for one in child.net_connections() if one.status == "LISTEN")
        child.kill()
        wait_for(lambda: not child.is_running() or child.status() == "zombie", timeout_s=5)
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", port))
            thief.listen()
            thief.settimeout(0.5)
            with pytest.raises(ClusterError, match="does not answer"):
                ray_runs(f"http://127.0.0.1:{local}", token=TOKEN)
            with contextlib.suppress(TimeoutError):
                connection, _ = thief.accept()
                with connection:
                    assert connection.recv(100) == b""


# Paths for OpenSSH


ODD = st.text(st.sampled_from(" \t%\"'\\#~$!;&=*?:é,ah{}"), min_size=1, max_size=12).filter(
    lambda text: "${" not in text and "\t" not in text
)


def parsed(command: list[str], name: str) -> list[str]:
    """The values of an option as OpenSSH's own parser reads them from a command line."""
    done = subprocess.run([command[0], "-G", *command[1:]], capture_output=True, text=True, check=True)
    return [line.partition(" ")[2] for line in done.stdout.splitlines() if line.lower().startswith(f"{name} ")]


@settings(max_examples=40, deadline=None)
@given(name=ODD)
@example(name="John Doe")
@example(name='a"b c\\')
@example(name="100%h %d")
@example(name="#x")
@example(name="~")
def test_ssh__odd_paths__openssh_reads_one_file_each(name: str) -> None:
    base = f"/home/{name}/state dir"
    gateway = SshHost(host="gate", known_hosts=Path(f"{base}/known"), identity_file=f"{base}/key", user="me")
    command = gateway.ssh()
    for option, path in (("userknownhostsfile", f"{base}/known"), ("identityfile", f"{base}/key")):
        (value,) = parsed(command, option)
        assert str(Path(path)) in (value, value.replace("%%", "%"))  # -G shows one kind before ssh replaces %%
    # The shell that runs a ProxyCommand sees the gateway's command line, after ssh has replaced %h and %p.
    proxy = parsed(SshHost(host="10.0.0.7", known_hosts=Path("/k")).ssh_through(gateway), "proxycommand")[0]
    shown = proxy.replace("%%", "\0").replace("%h", "10.0.0.7").replace("%p", "22").replace("\0", "%")
    script = f"ssh() {{ printf '%s\\n' \"$@\"; }}; {shown}"
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == [*command[1:-1], "-W", "[10.0.0.7]:22", "gate"]


@pytest.mark.parametrize("path", ["/home/${USER}/x", "/home/a\nb", "/home/a\x7f"])
def test_ssh__path_that_openssh_would_change__refused(path: str) -> None:
    with pytest.raises(ClusterError, match="ssh cannot use the path"):
        SshHost(host="h", known_hosts=Path(path)).ssh()


@dataclass(frozen=True, slots=True, kw_only=True)
class PipedServer:
    """OpenSSH's real server, spoken to through a pipe, so that no port is needed."""

    folder: Path

    def proxy(self, host_key: str) -> str:
        """The ProxyCommand that leads to it."""
        Path("/run/sshd").mkdir(exist_ok=True)
        (self.folder / "config").write_text(
            f"HostKey {self.folder / host_key}\nAuthorizedKeysFile {self.folder / 'host.pub'}\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        )
        return shlex.join(["/usr/sbin/sshd", "-i", "-f", str(self.folder / "config")])


@pytest.fixture
def sshd(tmp_path: Path) -> PipedServer:
    for key in ("host", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    return PipedServer(folder=tmp_path)


@pytest.mark.parametrize("name", ["John Doe", "50% h", 'a"b'])
def test_ssh__odd_state_folder__host_key_is_kept_and_required(sshd: PipedServer, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "id").symlink_to(tmp_path / "host")

    def log_in(host_key: str) -> subprocess.CompletedProcess[str]:
        machine = SshHost(host="h", known_hosts=folder / "known", identity_file=str(folder / "id"))
        options = ("-o", f"ProxyCommand={sshd.proxy(host_key)}", "-o", "BatchMode=yes")
        command = [*machine.ssh(*options), "echo", "hello"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=20)

    assert log_in("host").stdout == "hello\n"
    assert (folder / "known").read_text().count("ssh-ed25519") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["id", "known"]
    assert "Host key verification failed" in log_in("other").stderr


def test_forward__real_openssh__token_reaches_the_far_port(
    sshd: PipedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = shlex.quote(f"ProxyCommand={sshd.proxy('host')}")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -o {proxy} "$@"\n')
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    machine = SshHost(host="h", known_hosts=tmp_path / "known", identity_file=str(tmp_path / "host"))
    with server(ANSWER) as (port, received), machine.forward(port) as local:
        for _ in range(2):
            assert ray_runs(f"http://127.0.0.1:{local}", token=TOKEN) == []
    assert len(received) == 2 and TOKEN.encode() in received[0]


def test_dashboard__proxies_of_the_environment__are_not_asked(
    monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    body = b'{"data": {"result": {"result": [{"state": "ALIVE", "name": "supervisor-mine"}]}}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    with server(head + body) as (port, received):
        assert ray_runs(f"http://127.0.0.1:{port}", token=TOKEN) == ["mine"]
    assert len(received) == 1
