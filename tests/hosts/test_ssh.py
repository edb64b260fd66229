"""Clusters of existing hosts: real sshd, real Ray, every host with its own address and its own login shell."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.cluster.base import NodeProgress, read_record, token_path
from forge.cluster.ssh.connection import close_connections
from forge.cluster.ssh.provider import SshCluster
from forge.cluster.ssh.session import SshHost
from forge.cluster.ssh.wheel import Requirements
from forge.errors import ClusterError
from forge.runs.reader import read_metrics, read_run
from tests.support.command import environment, forge, mentioning, start_forge, wait_for
from tests.support.hosts import Hosts, can_make_hosts
from tests.support.ssh_cluster import spec_of, start, write_spec
from tests.support.sshd import (
    LOGIN_SHELLS,
    SSHD,
    START_UP_TEXT,
    another_host_key,
    client_key,
    stranger_key,
    use_login_shell,
)

JOB = """\
name: far
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 100000, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: "1..2", gpu: none}
tracking: {wandb: {mode: disabled}}
"""
SECRET = "planted-fedcba9876543210"
_ASK = """
import http.client, sys
for port in sys.argv[2:]:
    try:
        there = http.client.HTTPConnection(sys.argv[1], int(port), timeout=5)
        there.request("GET", "/metrics")
        print(there.getresponse().status)
    except (OSError, http.client.HTTPException):
        print("none")
"""
"""The HTTP status of each port for a client without the token."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if not (can_make_hosts() and Path(SSHD).exists()):
        pytest.skip("this needs the right to make network namespaces, iproute2, and OpenSSH's server")
    with Hosts(3) as hosts:
        for host, shell in enumerate(LOGIN_SHELLS):
            use_login_shell(hosts, host, shell)
            start(hosts, host)
        yield hosts


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "job.yaml").write_text(JOB)
    (home / "corpus").mkdir()
    (home / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    return home


@pytest.fixture(autouse=True)
def state(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_STATE", str(home / "state"))


def expect_failures(cluster: SshCluster, *, match: str) -> list[NodeProgress]:
    """The failures that an `up` reports before it fails."""
    progress: list[NodeProgress] = []
    with pytest.raises(ClusterError, match=match):
        cluster.up(on_progress=progress.append)
    return [one for one in progress if one.is_failure]


@pytest.fixture(scope="module")
def lab(hosts: Hosts, home: Path) -> Iterator[str]:
    """The file of a cluster on all three hosts; the cluster is stopped at the end."""
    write_spec(home / "lab.yaml", spec_of(hosts, min_machines=2))
    yield "lab.yaml"
    start_missing(hosts)
    ended = forge("cluster", "down", "lab", cwd=home)
    assert ended.returncode == 0, ended.stderr
    assert mentioning(str(hosts.folder / "forge")) == []
    assert read_record("lab") is None


@pytest.fixture
def cluster(lab: str, hosts: Hosts, home: Path) -> str:
    """The file of a cluster that is up on all three hosts, whatever an earlier test has done to it."""
    start_missing(hosts)
    if num_alive(hosts) != hosts.count:
        done = forge("cluster", "up", lab, cwd=home)
        assert done.returncode == 0, done.stderr
    return lab


def start_missing(hosts: Hosts) -> None:
    """Start sshd on the hosts where it does not run."""
    for host in range(hosts.count):
        try:
            socket.create_connection((hosts.ip(host), 22), timeout=2).close()
        except OSError:
            hosts.kill(host)
            start(hosts, host)


def num_alive(hosts: Hosts) -> int:
    with contextlib.suppress(ClusterError):
        return sum(node.state == "alive" for node in SshCluster(spec_of(hosts)).status().nodes)
    return 0


# Each test works alone and in any order. They share a cluster, because one takes ten seconds to start.
class TestUp:
    @pytest.mark.slow
    def test_up__host_unreachable__goes_on_without_it_and_up_again_repairs(
        self, cluster: str, hosts: Hosts, home: Path
    ) -> None:
        hosts.kill(2)  # neither sshd nor Ray runs there any more
        wait_for(lambda: num_alive(hosts) == 2)
        done = forge("cluster", "up", cluster, cwd=home)
        assert done.returncode == 0, done.stderr
        assert f"{hosts.ip(2)}: ! cannot be reached" in done.stderr
        assert "2 nodes" in done.stderr
        found = json.loads(forge("cluster", "status", "lab", "-o", "json", cwd=home).stdout)
        assert [(node["name"], node["kind"], node["state"]) for node in found["nodes"]] == [
            (hosts.ip(0), "head", "alive"),
            (hosts.ip(1), "worker", "alive"),
            (hosts.ip(2), "worker", "unreachable"),
        ]
        start(hosts, 2)
        before = heads(hosts)
        done = forge("cluster", "up", cluster, cwd=home)
        assert done.returncode == 0, done.stderr
        assert f"{hosts.ip(0)}: ready (it was up)" in done.stderr
        assert "3 nodes" in done.stderr
        assert heads(hosts) == before

    def test_token__missing_or_wrong__is_refused(self, cluster: str, hosts: Hosts, home: Path) -> None:
        inside = SshCluster(spec_of(hosts))
        state = state_of("lab")
        with inside.job_server() as url:
            for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
                request = urllib.request.Request(f"{url}/api/jobs/", headers=headers)
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(request, timeout=10)
                assert refused.value.code in (401, 403)
        # From another machine the dashboard is not even there.
        connect = f"import socket; socket.create_connection(('{hosts.ip(0)}', {state['job_port']}), timeout=3)"
        stranger = hosts.run(1, sys.executable, "-c", connect, stderr=subprocess.PIPE)
        assert b"ConnectionRefused" in stranger.communicate(timeout=20)[1]
        refused_job = "import ray; ray.init('auto', logging_level='error')"
        script = f"import os; os.environ.pop('RAY_AUTH_TOKEN_PATH'); {refused_job}"
        done = inside.on_head(["env", "-u", "RAY_AUTH_TOKEN_PATH", "HOME=/nowhere", sys.executable, "-c", script])
        assert done.returncode != 0

    def test_token__is_on_no_command_line_and_in_private_files_only(
        self, cluster: str, hosts: Hosts, home: Path
    ) -> None:
        token = token_path("lab").read_text()
        assert len(token) == 64
        assert mentioning(token) == []
        for root in (home, hosts.folder, *Path("/tmp").glob("forge-*")):
            for path in root.rglob("*"):
                if path.is_file() and token.encode() in path.read_bytes():
                    assert path.stat().st_mode & 0o077 == 0, path
                    assert path.name.endswith("token"), path

    @pytest.mark.slow
    def test_up__another_up_is_running__is_refused(self, cluster: str, hosts: Hosts, home: Path) -> None:
        first = start_forge("cluster", "up", cluster, cwd=home)
        wait_for(lambda: b"checking" in os.read(first.stderr.fileno(), 100))  # type: ignore[union-attr]
        first.send_signal(signal.SIGSTOP)  # it would be over before the second one has begun
        second = forge("cluster", "up", cluster, cwd=home)
        first.send_signal(signal.SIGCONT)
        assert (second.returncode, "another forge process is starting or stopping" in second.stderr) == (3, True)
        first.communicate(timeout=60)
        assert first.returncode == 0

    def test_ports__reachable_from_other_hosts__require_the_token(self, cluster: str, hosts: Hosts) -> None:
        listed = hosts.run(0, "ss", "-Hltn", stdout=subprocess.PIPE, text=True).communicate(timeout=20)[0]
        local = [line.split()[3].rpartition(":") for line in listed.splitlines()]
        ports = {port for address, _, port in local if "127.0.0.1" not in address and address != "[::1]"}
        assert len(ports) > 5
        stranger = hosts.run(1, sys.executable, "-c", _ASK, hosts.ip(0), *ports, stdout=subprocess.PIPE, text=True)
        answers = stranger.communicate(timeout=60)[0].split()
        assert len(answers) == len(ports)
        assert "401" in answers
        assert "200" not in answers

    @pytest.mark.slow
    def test_up__running_nodes_differ_from_the_file__are_not_touched(self, cluster: str, hosts: Hosts) -> None:
        before, state = heads(hosts), state_of("lab")
        progress = expect_failures(SshCluster(spec_of(hosts, ray_port=7000)), match="forge cluster down lab first")
        assert "Ray runs there with port 6379, the file says 7000 now" in progress[0].message
        expect_failures(
            SshCluster(spec_of(hosts, folder=str(hosts.folder / "other"))), match="with the file as it was"
        )
        turned = tuple(reversed(spec_of(hosts).machines))
        expect_failures(
            SshCluster(spec_of(hosts, machines=turned)), match=f"the head of 'lab' is {hosts.ip(0)}, but its file"
        )
        token = token_path("lab").read_text()
        token_path("lab").unlink()  # and another one is made
        expect_failures(
            SshCluster(spec_of(hosts)), match="with another token than this machine's; forge cluster down lab"
        )
        token_path("lab").write_text(token)
        assert (heads(hosts), state_of("lab")) == (before, state)

    @pytest.mark.slow
    def test_train__host_lost_and_repaired_and_drained__loses_no_step(
        self, cluster: str, hosts: Hosts, home: Path
    ) -> None:
        env = environment(home, WANDB_API_KEY=SECRET)
        client = start_forge("train", "job.yaml", "--cluster", "lab", cwd=home, env=env)
        folder = wait_for(lambda: next(home.glob("runs/*/metrics.jsonl"), None) or gone(client)).parent

        def world() -> int:
            steps = read_metrics(folder)
            return int(steps[-1]["elastic/world_size"]) if steps else 0

        wait_for(lambda: world() == 2 or gone(client))
        lost = worker_of(folder, head=hosts.ip(0))
        number = next(host for host in range(hosts.count) if hosts.ip(host) == lost)
        changes = len(steps_of(folder))
        hosts.kill(number)
        wait_for(lambda: len(steps_of(folder)) > changes + 50 or gone(client))
        start(hosts, number)
        repaired = forge("cluster", "up", cluster, cwd=home)
        assert repaired.returncode == 0, repaired.stderr
        wait_for(lambda: world() == 2 or gone(client))
        drained = worker_of(folder, head=hosts.ip(0))
        assert forge("cluster", "drain", "lab", drained, "--seconds", "20", cwd=home).returncode == 0
        wait_for(lambda: read_run(folder).newest("PreemptionNoticeReceived") or gone(client))
        client.send_signal(signal.SIGINT)
        out, err = client.communicate(timeout=90)
        assert client.returncode == 130, err
        run = read_run(folder)
        assert (run.status, steps_of(folder)) == ("stopped", list(range(1, run.step + 1)))
        assert str(hosts.folder / "shared") in (run.newest("CheckpointSaved") or {})["folder"]
        # Machines without the corpus got it from the head, into caches of their own.
        look = f"from glob import glob; print(glob('{hosts.folder}/cache/data/*/index.json'))"
        inside = SshCluster(spec_of(hosts))
        have = 0
        for number in range(hosts.count):
            shell = [*inside.shell(hosts.ip(number)), f'{sys.executable} -c "{look}"']
            found = subprocess.run(shell, capture_output=True, text=True, timeout=30, check=True).stdout
            have += "index.json" in found
        assert have >= 2
        assert SECRET not in out + err
        for root in (home, hosts.folder, *Path("/tmp").glob("forge-*")):
            for path in root.rglob("*"):
                assert not (path.is_file() and SECRET.encode() in path.read_bytes()), path
        assert forge("runs", "logs", folder.name, "--file", "supervisor", cwd=home).returncode == 0

    @pytest.mark.slow
    def test_up__head_lost__restarts_all_nodes(self, cluster: str, hosts: Hosts, home: Path) -> None:
        before = heads(hosts)
        hosts.kill(0)
        refused = forge("cluster", "status", "lab", cwd=home)
        assert (refused.returncode, f"{hosts.ip(0)} cannot be reached" in refused.stderr) == (3, True)
        start(hosts, 0)
        refused = forge("cluster", "status", "lab", cwd=home)
        assert (refused.returncode, "forge cluster up with its file restarts it" in refused.stderr) == (3, True)
        done = forge("cluster", "up", cluster, cwd=home)
        assert done.returncode == 0, done.stderr
        assert "3 nodes" in done.stderr
        assert not heads(hosts) & before

    def test_up__host_removed_from_the_file__is_stopped(self, cluster: str, hosts: Hosts) -> None:
        progress: list[NodeProgress] = []
        two = SshCluster(spec_of(hosts, machines=(hosts.ip(0), hosts.ip(1)), min_machines=2))
        assert len(two.up(on_progress=progress.append).nodes) == 2
        assert (hosts.ip(2), "stopped") in {(one.name, one.message) for one in progress}
        assert [line for line in mentioning(hosts.ip(2)) if "raylet" in line] == []


def state_of(name: str) -> dict[str, Any]:
    """The saved state of a cluster that is up."""
    record = read_record(name)
    assert record is not None
    return dict(record.state)


def worker_of(folder: Path, *, head: str) -> str:
    """The address of a node with ranks that is not the head."""
    run = read_run(folder)
    hosts_of = {event["node"]: str(event["host"]) for event in run.events if event["event"] == "NodeJoined"}
    formed = run.newest("GenerationStarted")
    assert formed is not None
    return next(hosts_of[place["node"]] for place in formed["ranks"] if hosts_of[place["node"]] != head)


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder)]


def gone(client: subprocess.Popen[str]) -> None:
    """Fail if the client has ended. Returns: None."""
    if client.poll() is not None:
        pytest.fail(f"the client has ended: {client.communicate()[1]}")


def heads(hosts: Hosts) -> set[int]:
    """The `ray start` processes of the first two hosts."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "start" in (line := process.info["cmdline"] or []) and {hosts.ip(0), hosts.ip(1)} & set(line)
    }


class TestErrors:
    @pytest.fixture
    def machine(self, hosts: Hosts, tmp_path: Path) -> SshHost:
        key = str(client_key(hosts))
        return SshHost(host=hosts.ip(0), known_hosts=tmp_path / "known", user="root", identity_file=key)

    @pytest.mark.slow
    def test_run__kill_on_disconnect__ends_the_command(self, machine: SshHost) -> None:
        lines = ("sleep 4321.5 | cat", "sh -c 'sleep 4321.5 & wait'")
        for line in lines:
            with pytest.raises(ClusterError, match="did not answer within 1 s"):
                machine.run(line, timeout_s=1.0, kill_on_disconnect=True)
            wait_for(lambda: not mentioning("4321.5"), timeout_s=5)

    def test_run__kill_on_disconnect__leaves_no_watcher(self, machine: SshHost) -> None:
        for line in ("echo $PPID; exit 3", "echo $PPID; exec sh -c 'exit 3'", "echo $PPID; false || (exit 3)"):
            done = machine.run(line, kill_on_disconnect=True)
            assert done.returncode == 3
            words = (f"-d /proc/{done.stdout.decode().strip()}", "/proc/$PPID")
            wait_for(partial(lambda words: not mentioning(*words), words), timeout_s=5)

    def test_run__any_login_shell__start_up_text_is_no_output(self, hosts: Hosts, machine: SshHost) -> None:
        for host in range(hosts.count):
            there = replace(machine, host=hosts.ip(host))
            plain = subprocess.run([*there.ssh(), "true"], capture_output=True, check=True, timeout=20)
            assert START_UP_TEXT.encode() in plain.stdout
            done = there.run(["printf", "%s|", "it's", "a!b", "$HOME *", "c\\d\n%e", "ü"], stdin=b"")
            assert (done.stdout.decode(), done.stderr) == ("it's|a!b|$HOME *|c\\d\n%e|ü|", b"")

    def test_up__key_not_authorized__is_refused(self, hosts: Hosts) -> None:
        other = spec_of(hosts, name="keyless", identity_file=str(stranger_key(hosts)))
        progress = expect_failures(SshCluster(other), match="the head of 'keyless'")
        assert all("SSH authentication to root@" in one.message for one in progress)

    def test_up__other_python__is_refused(self, hosts: Hosts, tmp_path: Path) -> None:
        older = tmp_path / "python"
        older.write_text('#!/bin/sh\necho \'{"python": "3.9.7"}\'\n')
        older.chmod(0o755)
        progress = expect_failures(
            SshCluster(spec_of(hosts, name="older", python=str(older))), match=r"Python 3\.9\.7"
        )
        assert len(progress) == hosts.count

    def test_up__other_ray__is_refused(self, hosts: Hosts, tmp_path: Path) -> None:
        other = tmp_path / "python"
        other.write_text(f'#!/bin/sh\n{sys.executable} "$@" | sed \'s/"ray": "[0-9.]*"/"ray": "2.9.9"/\'\n')
        other.chmod(0o755)
        match = r"it has ray 2\.9\.9, and this machine .*: .*python -m pip install ray=="
        assert expect_failures(SshCluster(spec_of(hosts, name="older", python=str(other))), match=match)

    def test_up__ray_port_taken__is_refused(self, hosts: Hosts) -> None:
        hold = "import socket, time; s = socket.socket(); s.bind(('', 7777)); s.listen(); time.sleep(60)"
        hosts.run(0, sys.executable, "-c", hold)
        time.sleep(0.5)
        cluster = SshCluster(spec_of(hosts, name="taken", ray_port=7777))
        assert expect_failures(cluster, match="port 7777 is taken there")

    def test_up__host_key_changed__is_refused(self, hosts: Hosts) -> None:
        cluster = SshCluster(
            spec_of(hosts, name="reinstalled", machines=(hosts.ip(2),), ray_port=7778, python="/nowhere/python")
        )
        assert expect_failures(cluster, match="/nowhere/python does not run there")  # and its key is known now
        hosts.kill(2)
        with another_host_key(hosts, 2):
            start(hosts, 2)
            expect_failures(cluster, match=r"has another key than before.*ssh-keygen -R")
        hosts.kill(2)
        start(hosts, 2)  # with its own key, for other tests

    def test_up__no_host_usable__lists_all_failures(self, hosts: Hosts) -> None:
        few = spec_of(hosts, name="few", machines=(hosts.ip(0), "nobody.invalid"), python="/nowhere/python")
        progress = expect_failures(SshCluster(few), match="cannot work without it; all failures")
        assert {one.name for one in progress} == {hosts.ip(0), "nobody.invalid"}

    def test_up__ctrl_c_while_starting__down_finds_everything(
        self, hosts: Hosts, home: Path, tmp_path: Path
    ) -> None:
        slow = tmp_path / "python"
        slow.write_text(f'#!/bin/sh\ncase "$*" in *node_cli?up*) sleep 30;; esac\nexec {sys.executable} "$@"\n')
        slow.chmod(0o755)
        write_spec(home / "slow.yaml", spec_of(hosts, name="slow", python=str(slow)))
        process = start_forge("cluster", "up", "slow.yaml", cwd=home)
        assert process.stderr is not None
        read_until(process.stderr.readline, "starting Ray")
        wait_for(lambda: [line for line in mentioning(str(slow)) if not line.startswith("ssh ")])
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "forge cluster down slow" in err
        assert read_record("slow") is not None
        wait_for(lambda: not mentioning(str(slow)), timeout_s=5)  # it would have started Ray after `down`
        slow.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        assert forge("cluster", "down", "slow", cwd=home).returncode == 0
        assert read_record("slow") is None

    @pytest.mark.slow
    def test_up__too_few_hosts__starts_nothing(self, hosts: Hosts) -> None:
        spec = spec_of(hosts, name="small", machines=(hosts.ip(0), "nobody.invalid"))
        progress = expect_failures(
            SshCluster(spec),
            match="1 of at least 2 machines of 'small' are ready.*(?s:.*)nothing was started",
        )
        assert "correct it under machines in the cluster's file" in progress[0].message
        close_connections()
        assert mentioning("small") == []


@pytest.mark.slow
def test_up__no_python_in_the_file__installs_forge(hosts: Hosts, home: Path, tmp_path: Path) -> None:
    """From wheels that are copied there, because these hosts reach no package index: half a gigabyte."""
    locked = Requirements.locked()
    names = [line.partition(" ")[0] for line in f"{locked.wheels}{locked.sources}".splitlines() if "==" in line]
    here = {one.metadata["Name"].lower().replace("_", "-") for one in distributions()}
    pins = [name for name in names if name.partition("==")[0] in here]  # without the CUDA libraries
    (tmp_path / "requirements.txt").write_text("\n".join(pins))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--wheel-dir", str(tmp_path / "wheels")]
    subprocess.run([*pip, "-r", str(tmp_path / "requirements.txt")], check=True)
    machines = (hosts.ip(0),)
    wheels = str(tmp_path / "wheels")
    spec = spec_of(hosts, name="bare", machines=machines, python=None, wheels=wheels, ray_port=7779)  # beside lab
    bare, progress = SshCluster(spec), list[NodeProgress]()
    try:
        bare.up(on_progress=progress.append)
        python = json.loads(bare.on_head(["python", "-m", "forge.remote.head_cli", "check"]).stdout)["answer"][
            "python"
        ]
        assert python.startswith(str(hosts.folder / "forge" / "envs"))
        assert any("installing forge" in one.message for one in progress)
        built = Path(python).stat().st_mtime
        bare.up(on_progress=progress.append)
        assert Path(python).stat().st_mtime == built
    finally:
        assert bare.down(on_progress=progress.append) == []


def read_until(read: Callable[[], str], words: str) -> None:
    timer = threading.Timer(30, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    while words not in read():
        pass
    timer.cancel()
