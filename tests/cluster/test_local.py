"""The cluster on this machine, with the real Ray: up, status, growth, down, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.cluster.base import list_records
from forge.cluster.local.provider import LocalCluster
from forge.cluster.local.ray_cluster import find_local, require_private_token, stop_local
from forge.cluster.local.ray_process import NodeProcess, boot_id
from forge.errors import ClusterError
from forge.process import start_ticks
from tests.support.command import environment, family, forge, mentioning, start_forge, survivors, wait_for
from tests.support.ports import answers, open_ports, requires_token


def record_path(home: Path) -> Path:
    return home / "state" / "clusters" / "local.json"


def state_of(home: Path) -> dict[str, Any]:
    return dict(json.loads(record_path(home).read_text())["state"])


def nodes_of(home: Path) -> list[dict[str, Any]]:
    return list(state_of(home)["nodes"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def cluster(home: Path) -> dict[str, Any]:
    """A cluster with at least one node: the one that is up, or a new one."""
    done = forge("cluster", "up", cwd=home)
    assert done.returncode == 0, done.stderr
    assert re.search(r"cluster up at \S+: \d nodes, \d+ CPUs\n", done.stderr)
    assert "dashboard: http://127.0.0.1:" in done.stderr
    assert f"RAY_AUTH_MODE=token ray status --address {state_of(home)['address']}" in done.stderr
    assert (Path.home() / ".ray" / "auth_token").read_text() not in done.stderr
    assert done.stdout == ""
    return state_of(home)


@pytest.fixture(scope="module", autouse=True)
def _taken_down(home: Path) -> Iterator[None]:
    yield
    forge("cluster", "down", cwd=home)


# Each test works alone and in any order. They share a cluster where they can: one takes ten seconds to start.
class TestUp:
    def test_up__more_nodes_from_another_process__keeps_the_head(self, cluster: dict[str, Any], home: Path) -> None:
        done = forge("cluster", "up", "--nodes", "2", cwd=home)
        assert done.returncode == 0, done.stderr
        assert f"cluster up at {cluster['address']}: 2 nodes" in done.stderr
        assert nodes_of(home)[0] == cluster["nodes"][0]

    def test_up__again__changes_nothing(self, cluster: dict[str, Any], home: Path) -> None:
        before = nodes_of(home)
        done = forge("cluster", "up", "--nodes", str(len(before)), cwd=home)
        assert done.returncode == 0, done.stderr
        assert nodes_of(home) == before

    def test_status__two_nodes__shows_both_and_json_on_stdout(self, cluster: dict[str, Any], home: Path) -> None:
        forge("cluster", "up", "--nodes", "2", cwd=home)
        done = forge("cluster", "status", "-o", "json", cwd=home)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["address"] == cluster["address"]
        assert [node["state"] for node in found["nodes"]] == ["alive", "alive"]
        assert all(node["free_cpus"] == node["num_cpus"] >= 1 for node in found["nodes"])
        assert [node["kind"] for node in found["nodes"]] == ["head", "worker"]
        table = forge("cluster", "status", cwd=home).stdout.splitlines()
        assert [line.split()[:2] for line in table[1:]] == [
            [node["node_id"][:8], "alive"] for node in found["nodes"]
        ]

    def test_up__token__is_required_and_readable_by_its_owner_only(self, cluster: dict[str, Any]) -> None:
        token = Path.home() / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o077 == 0
        for node in cluster["nodes"]:
            assert psutil.Process(node["pid"]).environ()["RAY_AUTH_MODE"] == "token"

    def test_ports__reachable_from_other_machines__show_nothing_without_the_token(
        self, cluster: dict[str, Any], home: Path
    ) -> None:
        processes = [process for node in nodes_of(home) for process in family(node["pid"])]
        ports = open_ports(processes, host=cluster["address"].partition(":")[0])
        assert len(ports) >= 3, ports
        assert {f"{port} of {name[-60:]}": shown for port, name in ports.items() if (shown := answers(*port))} == {}
        assert [name for port, name in ports.items() if not requires_token(*port)] == []
        assert not [name for name in ports.values() if "ray.util.client" in name]

    def test_status__another_process_has_the_dashboards_port__gets_no_token(
        self, cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch, home: Path
    ) -> None:
        monkeypatch.setenv("FORGE_STATE", str(home / "state"))
        found = find_local()
        assert found is not None
        with socket.create_server(("127.0.0.1", 0)) as thief:
            thief.settimeout(0.2)
            moved = replace(found, job_server=f"http://127.0.0.1:{thief.getsockname()[1]}")
            monkeypatch.setattr("forge.cluster.local.provider.find_local", lambda: moved)
            with pytest.raises(ClusterError, match="none of its processes listens on port"):
                LocalCluster().status()
            with pytest.raises(TimeoutError):
                thief.accept()

    def test_down__leaves_no_process_and_no_state(self, cluster: dict[str, Any], home: Path) -> None:
        nodes = nodes_of(home)
        processes = [process for node in nodes for process in family(node["pid"])]
        assert len(processes) > 3 * len(nodes)
        session = f"_{nodes[0]['pid']}/"  # Ray names its session's folder after the process that started it
        assert mentioning(session)
        done = forge("cluster", "down", cwd=home)
        assert (done.returncode, done.stderr) == (0, f"cluster down: {len(nodes)} nodes stopped\n")
        assert survivors(processes) == []
        assert mentioning(session) == []
        assert not [process for process in psutil.process_iter() if sid(process) in {n["pid"] for n in nodes}]
        assert not record_path(home).exists()


def test_down_and_status__no_cluster__say_so(tmp_path: Path) -> None:
    assert forge("cluster", "down", cwd=tmp_path).stderr == "no cluster is up\n"
    assert "no cluster is up" in forge("cluster", "status", cwd=tmp_path).stderr
    found = json.loads(forge("cluster", "status", "-o", "json", cwd=tmp_path).stdout)
    assert (found["address"], found["nodes"]) == (None, [])


def sid(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def test_up__port_taken__names_it_and_starts_nothing(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = forge("cluster", "up", "--port", str(port), cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith(
        f"error: port {port} cannot be used for the cluster's head: Address already in use"
    )
    assert "Traceback" not in done.stderr
    assert not record_path(tmp_path).exists()


def test_up__state_folder_not_writable__names_it(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    done = forge("cluster", "up", cwd=tmp_path)
    assert done.returncode == 3
    assert "error: the state folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_up__ctrl_c_while_it_starts__leaves_nothing_behind(tmp_path: Path) -> None:
    process = start_forge("cluster", "up", cwd=tmp_path, env=environment(tmp_path))
    wait_for(record_path(tmp_path).exists)
    (node,) = nodes_of(tmp_path)
    assert state_of(tmp_path)["address"] == ""  # so that nothing takes it for a cluster that is up
    started = family(node["pid"])
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert survivors(started) == []
    assert not record_path(tmp_path).exists()


class TestStaleState:
    @pytest.fixture
    def foreign(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process that forge did not start, leader of its session, with a child."""
        process = subprocess.Popen(
            ["sh", "-c", "sleep 100 & wait"], start_new_session=True
        )  # fmt: skip
        yield process
        for member in family(process.pid) if process.poll() is None else []:
            member.kill()
        process.wait()

    def write(self, text: str) -> Path:
        path = Path(os.environ["FORGE_STATE"]) / "clusters" / "local.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def write_state(self, **node: Any) -> None:
        state = {"address": "127.0.0.1:1", "nodes": [{"num_cpus": 1} | node]}
        self.write(json.dumps({"name": "local", "provider": "local", "spec": {}, "state": state}))

    @pytest.fixture(autouse=True)
    def _own_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))

    @pytest.mark.parametrize("wrong", ["start", "boot"])
    def test_stop__pid_reused__leaves_the_foreign_process_alone(
        self, foreign: subprocess.Popen[bytes], wrong: str
    ) -> None:
        ticks, boot = start_ticks(foreign.pid), boot_id()
        assert ticks is not None
        wait_for(lambda: len(family(foreign.pid)) == 2)
        self.write_state(
            pid=foreign.pid,
            started_ticks=ticks - (wrong == "start"),
            boot_id="another" if wrong == "boot" else boot,
        )
        assert find_local() is None
        assert stop_local() == 0
        assert len([process for process in family(foreign.pid) if process.is_running()]) == 2

    def test_stop__head_has_died__ends_what_it_left(self, foreign: subprocess.Popen[bytes]) -> None:
        node = NodeProcess(
            pid=foreign.pid,
            started_ticks=start_ticks(foreign.pid) or 0,
            boot_id=boot_id(),
            num_cpus=1,
        )
        self.write_state(pid=node.pid, started_ticks=node.started_ticks, boot_id=node.boot_id)
        assert find_local() is not None
        assert list_records() == [], "the cluster of this machine is not among those that `down NAME` stops"
        left = wait_for(lambda: family(foreign.pid)[1:])
        foreign.kill()
        foreign.wait()
        assert not node.is_alive
        assert find_local() is None
        assert stop_local() == 0
        assert survivors(left) == []

    @pytest.mark.parametrize(
        "text",
        [
            *("", "[]", "{}", "\x00", '{"nodes": [{}]}'),
            '{"name": "local", "provider": "local", "spec": {}, "state": {"nodes": [{}]}}',
            '{"name": "local", "provider": "local", "spec": {}, "state": {"address": "x", "nodes": []}}',
            '{"name": "local", "provider": "local", "spec": {}, "state": []}',
        ],
    )
    def test_find__record_not_readable__is_no_cluster(self, text: str) -> None:
        path = self.write(text)
        assert find_local() is None
        assert stop_local() == 0
        assert not path.exists()


class TestToken:
    @pytest.fixture(autouse=True)
    def token(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "ray" / "token"))
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        return tmp_path / "ray" / "token"

    def test_token__missing__is_made_for_its_owner_only_and_kept(self, token: Path) -> None:
        require_private_token()
        first = token.read_text()
        assert (len(first), token.stat().st_mode & 0o777) == (64, 0o600)
        require_private_token()
        assert token.read_text() == first

    def test_token__readable_by_others__is_made_private(self, token: Path) -> None:
        token.parent.mkdir()
        token.write_text("theirs")
        token.chmod(0o644)
        require_private_token()
        assert (token.read_text(), token.stat().st_mode & 0o777) == ("theirs", 0o600)

    def test_token__switched_off_by_the_user__is_not_made(
        self, token: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        require_private_token()
        assert not token.exists()
