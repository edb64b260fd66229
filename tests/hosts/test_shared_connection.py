"""One ssh connection to a host: shared, opened again, refused, and gone with the process that holds it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
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


def test_cancel_all__connection_is_being_opened__says_that_it_was_cancelled(tmp_path: Path) -> None:
    failures: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:  # never says that it is an SSH server
        host = SshHost(host="127.0.0.1", port=silent.getsockname()[1], known_hosts=tmp_path / "known")

        def run() -> None:
            with pytest.raises(ClusterError) as caught:
                host.run(["true"])
            failures.append(str(caught.value))

        thread = threading.Thread(target=run)
        thread.start()
        connection, _ = silent.accept()
        with connection:
            cancel_all()
            thread.join()
    assert failures == ["127.0.0.1 was cancelled"]


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
        with pytest.raises(ClusterError, match=r"was cancelled$"):
            host.run(["sleep", "4321.75"], kill_on_disconnect=True)
        ended.append("4321.75")

    ended: list[str] = []
    thread = threading.Thread(target=sleep)
    thread.start()
    wait_for(lambda: mentioning("4321.75"), timeout_s=5)
    cancel_all()
    thread.join(5)
    assert ended == ["4321.75"]
    wait_for(lambda: not mentioning("4321.75"), timeout_s=5)


def test_run__connection_lost_meanwhile__says_so(hosts: Hosts, tmp_path: Path) -> None:
    host = machine(hosts, tmp_path)
    host.run(["true"])
    timer = threading.Timer(0.5, ssh_process(host).kill)
    timer.start()
    with pytest.raises(ClusterError, match=r"was lost while a command ran there$"):
        host.run(["sleep", "4321.9"])
    subprocess.run(["pkill", "-f", "4321.9"], check=False)


def test_run__another_thread_waits_for_the_host__times_out_all_the_same(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    began, messages = time.monotonic(), list[str]()

    def run() -> None:
        with pytest.raises(ClusterError) as raised:
            machine(hosts, tmp_path).run(["true"], timeout_s=1.0)
        messages.append(str(raised.value))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all("did not answer within 1 s" in message for message in messages)
    assert len(messages) == 4
    assert time.monotonic() - began < 2.5


def test_forward__configuration_clears_all_forwardings__works(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("ClearAllForwardings yes\nControlMaster auto\nControlPersist yes\n")
    program = tmp_path / "ssh"
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp_path}/config "$@"\n')
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        with machine(hosts, tmp_path).forward(22) as port:
            assert greeting(port) == b"SSH-2.0"
    close_connections()
    wait_for(lambda: not mentioning(str(tmp_path / "known")), timeout_s=5)


def test_options__too_many_hosts__have_connections_of_their_own(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_connections()
    monkeypatch.setattr("forge.cluster.ssh.connection._MAX_SHARED", 0)
    before = num_logins(hosts)
    for _ in range(2):
        assert machine(hosts, tmp_path).run(["echo", "works"]).stdout == b"works\n"
    assert num_logins(hosts) == before + 2


def test_terminal_closed__leaves_neither_connection_nor_command(hosts: Hosts, tmp_path: Path) -> None:
    host = machine(hosts, tmp_path)
    words = [host.host, str(tmp_path / "known"), str(host.identity_file)]
    code = _HOLDER.replace("time.sleep(60)", 'host.run(["sleep", "4322.5"], kill_on_disconnect=True)')
    with subprocess.Popen([sys.executable, "-P", "-c", code, *words], start_new_session=True) as process:
        assert wait_for(lambda: mentioning("sleep 4322.5"), timeout_s=10)
        os.killpg(process.pid, signal.SIGHUP)
    assert wait_for(lambda: not mentioning(str(tmp_path / "known")), timeout_s=5)
    assert wait_for(lambda: not mentioning("4322.5"), timeout_s=5)


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
