"""One ssh connection to a host: shared, opened again, refused, and gone with the process that holds it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.cluster.ssh.connection import close_connections, shared_connection
from forge.cluster.ssh.session import SshHost, cancel_all
from forge.errors import ClusterError
from tests.support.command import mentioning, wait_for
from tests.support.hosts import Hosts, can_make_hosts
from tests.support.sshd import SSHD, client_key, start_sshd

_HOLDER = """
import sys, time
from pathlib import Path
from forge.cluster.ssh.session import SshHost
host = SshHost(host=sys.argv[1], known_hosts=Path(sys.argv[2]), user="root", identity_file=sys.argv[3])
host.run(["true"])
print("connected", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if not (can_make_hosts() and Path(SSHD).exists()):
        pytest.skip("this needs the right to make network namespaces, iproute2, and OpenSSH's server")
    with Hosts(2) as hosts:
        start_sshd(hosts, 0)
        start_sshd(hosts, 1, max_sessions=1)
        yield hosts
        close_connections()


def machine(hosts: Hosts, folder: Path, number: int = 0) -> SshHost:
    key = str(client_key(hosts))
    return SshHost(host=hosts.ip(number), known_hosts=folder / "known", user="root", identity_file=key)


def num_logins(hosts: Hosts, number: int = 0) -> int:
    return (hosts.folder / f"sshd-{number}" / "log").read_text().count("Accepted publickey")


def ssh_process(host: SshHost) -> subprocess.Popen[bytes]:
    process = shared_connection(host.ssh("-T", "-o", "BatchMode=yes"))._process
    assert process is not None
    return process


def greeting(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        return connection.recv(7)


def test_run_and_forward__several_commands__log_in_once(hosts: Hosts, tmp_path: Path) -> None:
    host, before = machine(hosts, tmp_path), num_logins(hosts)
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(host.run(["cat"], stdin=b"in").stdout)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"in"] * 4
    assert host.run(["sh", "-c", "echo problem >&2; exit 3"]).returncode == 3
    with host.forward(22) as port, host.forward(22) as other:
        assert greeting(port) == greeting(other) == b"SSH-2.0"
    assert num_logins(hosts) == before + 1


def test_run__connection_lost__opens_another(hosts: Hosts, tmp_path: Path) -> None:
    host = machine(hosts, tmp_path)
    host.run(["true"])
    lost = ssh_process(host)
    lost.kill()
    lost.wait()
    assert host.run(["echo", "again"]).stdout == b"again\n"
    assert ssh_process(host).pid != lost.pid


def test_run_and_forward__server_allows_one_session__work_all_the_same(hosts: Hosts, tmp_path: Path) -> None:
    host = machine(hosts, tmp_path, 1)
    for _ in range(2):
        done = host.run(["echo", "works"])
        assert (done.returncode, done.stdout, done.stderr) == (0, b"works\n", b"")
    with host.forward(22) as port:
        assert greeting(port) == b"SSH-2.0"


def test_run__kill_on_disconnect_times_out_or_is_cancelled__ends_the_command(hosts: Hosts, tmp_path: Path) -> None:
    host = machine(hosts, tmp_path)
    host.run(["true"])
    with pytest.raises(ClusterError, match="did not answer within 1 s"):
        host.run(["sleep", "4321.25"], timeout_s=1.0, kill_on_disconnect=True)
    wait_for(lambda: not mentioning("4321.25"), timeout_s=5)

    def sleep() -> None:
        with contextlib.suppress(ClusterError):
            host.run(["sleep", "4321.75"], kill_on_disconnect=True)

    thread = threading.Thread(target=sleep)
    thread.start()
    wait_for(lambda: mentioning("4321.75"), timeout_s=5)
    cancel_all()
    thread.join(5)
    assert not thread.is_alive()
    wait_for(lambda: not mentioning("4321.75"), timeout_s=5)


def test_process_killed__leaves_no_connection(hosts: Hosts, tmp_path: Path) -> None:
    host = machine(hosts, tmp_path)
    words = [host.host, str(tmp_path / "known"), str(host.identity_file)]
    with subprocess.Popen([sys.executable, "-P", "-c", _HOLDER, *words], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"connected\n"
        assert len(mentioning(str(tmp_path / "known"))) == 2  # it, and ssh
        process.kill()
    wait_for(lambda: not mentioning(str(tmp_path / "known")), timeout_s=5)


def test_run__key_refused__is_explained_each_time(hosts: Hosts, tmp_path: Path) -> None:
    host = SshHost(
        host=hosts.ip(0), known_hosts=tmp_path / "known", user="root", identity_file=str(tmp_path / "no")
    )
    for _ in range(2):
        with pytest.raises(ClusterError, match=r"SSH authentication to root@.* failed: the key .* does not exist"):
            host.run(["true"])
