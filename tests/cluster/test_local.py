"""The cluster on this machine, with the real Ray: up, seen, grown, down, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.cluster.local.ray_cluster import find_local, require_private_token, stop_local
from forge.cluster.local.ray_process import NodeProcess, boot_id, start_ticks
from tests.support.command import environment, family, forge, mentioning, start_forge, survivors, wait_for


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[dict[str, Any]]:
    """`forge cluster up` with one node; taken down in any case."""
    done = forge("cluster", "up", cwd=home)
    try:
        assert done.returncode == 0, done.stderr
        assert re.match(r"cluster up at \S+: 1 nodes, \d+ CPUs\n", done.stderr)
        assert done.stdout == ""
        yield json.loads((home / "state" / "cluster.json").read_text())
    finally:
        forge("cluster", "down", cwd=home)


def nodes_of(home: Path) -> list[dict[str, Any]]:
    return list(json.loads((home / "state" / "cluster.json").read_text())["nodes"])


# These belong together and run in this order: a cluster takes ten seconds to start.
class TestUp:
    def test_it_can_be_grown_by_another_process(self, cluster: dict[str, Any], home: Path) -> None:
        done = forge("cluster", "up", "--nodes", "2", cwd=home)
        assert done.returncode == 0, done.stderr
        assert f"cluster up at {cluster['address']}: 2 nodes" in done.stderr
        assert nodes_of(home)[0] == cluster["nodes"][0]

    def test_up_again_changes_nothing(self, cluster: dict[str, Any], home: Path) -> None:
        before = nodes_of(home)
        done = forge("cluster", "up", "--nodes", "2", cwd=home)
        assert done.returncode == 0, done.stderr
        assert nodes_of(home) == before

    def test_status_shows_every_node_and_json_goes_to_stdout_alone(
        self, cluster: dict[str, Any], home: Path
    ) -> None:
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

    def test_the_token_that_guards_it_is_its_owners_alone(self, cluster: dict[str, Any]) -> None:
        token = Path.home() / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o077 == 0
        for node in cluster["nodes"]:
            assert psutil.Process(node["pid"]).environ()["RAY_AUTH_MODE"] == "token"

    def test_down_leaves_no_process_and_no_state(self, cluster: dict[str, Any], home: Path) -> None:
        nodes = nodes_of(home)
        processes = [process for node in nodes for process in family(node["pid"])]
        assert len(processes) > 6
        session = f"_{nodes[0]['pid']}/"  # its folder is named after the process that began it
        assert mentioning(session)
        done = forge("cluster", "down", cwd=home)
        assert (done.returncode, done.stderr) == (0, "cluster down: 2 nodes ended\n")
        assert survivors(processes) == []
        assert mentioning(session) == []
        assert not [process for process in psutil.process_iter() if sid(process) in {n["pid"] for n in nodes}]
        assert not (home / "state" / "cluster.json").exists()

    def test_down_and_status_without_one_say_so(self, home: Path) -> None:
        assert forge("cluster", "down", cwd=home).stderr == "no cluster is up\n"
        assert "no cluster is up" in forge("cluster", "status", cwd=home).stderr
        found = json.loads(forge("cluster", "status", "-o", "json", cwd=home).stdout)
        assert (found["address"], found["nodes"]) == (None, [])


def sid(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def test_a_port_that_is_taken_is_named_and_nothing_is_started(tmp_path: Path) -> None:
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
    assert not (tmp_path / "state" / "cluster.json").exists()


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    done = forge("cluster", "up", cwd=tmp_path)
    assert done.returncode == 3
    assert "error: the state folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    state = tmp_path / "state" / "cluster.json"
    process = start_forge("cluster", "up", cwd=tmp_path, env=environment(tmp_path))
    wait_for(state.exists)
    (node,) = json.loads(state.read_text())["nodes"]
    assert json.loads(state.read_text())["address"] == ""  # nobody takes it for one that is up
    started = family(node["pid"])
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert survivors(started) == []
    assert not state.exists()


class TestStaleState:
    @pytest.fixture
    def stranger(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process of somebody else's, leader of its session, with a child."""
        process = subprocess.Popen(
            ["sh", "-c", "sleep 100 & wait"], start_new_session=True
        )  # fmt: skip
        yield process
        for member in family(process.pid) if process.poll() is None else []:
            member.kill()
        process.wait()

    def write_state(self, **node: Any) -> None:
        path = Path(os.environ["FORGE_STATE"]) / "cluster.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"address": "127.0.0.1:1", "nodes": [{"num_cpus": 1} | node]}))

    @pytest.fixture(autouse=True)
    def _own_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))

    @pytest.mark.parametrize("wrong", ["start", "boot"])
    def test_a_process_that_has_the_pid_by_now_is_left_alone(
        self, stranger: subprocess.Popen[bytes], wrong: str
    ) -> None:
        ticks, boot = start_ticks(stranger.pid), boot_id()
        assert ticks is not None
        wait_for(lambda: len(family(stranger.pid)) == 2)
        self.write_state(
            pid=stranger.pid,
            started_ticks=ticks - (wrong == "start"),
            boot_id="another" if wrong == "boot" else boot,
        )
        assert find_local() is None
        assert stop_local() == 0
        assert len([process for process in family(stranger.pid) if process.is_running()]) == 2

    def test_a_head_that_has_died_is_not_believed_and_what_it_left_is_ended(
        self, stranger: subprocess.Popen[bytes]
    ) -> None:
        node = NodeProcess(
            pid=stranger.pid,
            started_ticks=start_ticks(stranger.pid) or 0,
            boot_id=boot_id(),
            num_cpus=1,
        )
        self.write_state(pid=node.pid, started_ticks=node.started_ticks, boot_id=node.boot_id)
        assert find_local() is not None
        left = wait_for(lambda: family(stranger.pid)[1:])
        stranger.kill()
        stranger.wait()
        assert not node.is_alive
        assert find_local() is None
        assert stop_local() == 0
        assert survivors(left) == []

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"nodes": [{}]}', '{"address": "x", "nodes": []}', "\x00"])
    def test_a_state_that_is_not_ours_is_no_cluster(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "cluster.json").write_text(text)
        assert find_local() is None
        assert stop_local() == 0
        assert not (tmp_path / "state" / "cluster.json").exists()


class TestToken:
    @pytest.fixture(autouse=True)
    def token(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "ray" / "token"))
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        return tmp_path / "ray" / "token"

    def test_it_is_made_for_its_owner_alone_and_kept(self, token: Path) -> None:
        require_private_token()
        first = token.read_text()
        assert (len(first), token.stat().st_mode & 0o777) == (64, 0o600)
        require_private_token()
        assert token.read_text() == first

    def test_one_that_others_can_read_is_closed_to_them(self, token: Path) -> None:
        token.parent.mkdir()
        token.write_text("theirs")
        token.chmod(0o644)
        require_private_token()
        assert (token.read_text(), token.stat().st_mode & 0o777) == ("theirs", 0o600)

    def test_whoever_switched_it_off_is_obeyed(self, token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        require_private_token()
        assert not token.exists()
