"""`forge eval` and `forge serve` on a cluster of hosts: which share the folder of its storage."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from forge.inference.generate import generate
from forge.inference.loaded import load
from forge.inference.sampling import SamplingParams
from forge.process import free_port
from tests.support.command import environment, forge, mentioning, start_forge, wait_for
from tests.support.hosts import Hosts, can_make_hosts
from tests.support.serving import write_causal_lm
from tests.support.ssh_cluster import spec_of, start, write_spec
from tests.support.sshd import LOGIN_SHELLS, SSHD, use_login_shell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TASK = """\
name: river
data: {files: data.jsonl}
kind: generate
prompt: question
target: answer
sampling: {max_tokens: 100}
metrics: {bleu: {}, exact_match: {}}
"""
PROMPTS = [f"the {word}" for word in ("quick", "brown fox", "lazy dog", "jugs", "dozen", "box", "five", "liquor")]
NUM_SHARDS = 40


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if not (can_make_hosts() and Path(SSHD).exists()):
        pytest.skip("this needs the right to make network namespaces, iproute2, and OpenSSH's server")
    with Hosts(2) as hosts:
        for host in range(hosts.count):
            use_login_shell(hosts, host, LOGIN_SHELLS[host])
            others = [hosts.folder / f"home-{other}" for other in range(hosts.count) if other != host]
            temporary = hosts.folder / "tmp"
            start(hosts, host, environment={"TMPDIR": str(temporary)}, private=[temporary, *others])
        yield hosts


@pytest.fixture(scope="module")
def home(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a task and the file of a cluster of both hosts, which is up."""
    home = tmp_path_factory.mktemp("home")
    write_causal_lm(home / "tiny")
    (home / "river.yaml").write_text(TASK)
    lines = [json.dumps({"question": f"train {n}", "answer": str(n)}) for n in range(32 * NUM_SHARDS)]
    (home / "data.jsonl").write_text("\n".join(lines))
    write_spec(home / "lab.yaml", spec_of(hosts))
    up = forge("cluster", "up", "lab.yaml", cwd=home, timeout_s=400)
    assert up.returncode == 0, up.stderr
    yield home
    down = forge("cluster", "down", "lab", cwd=home, timeout_s=400)
    assert down.returncode == 0, down.stderr
    assert mentioning(str(hosts.folder / "forge")) == []


def hosts_with(hosts: Hosts, word: str) -> set[int]:
    """The hosts on which a process with this word in its command runs."""
    found = set()
    for host in range(hosts.count):
        for process in hosts.processes(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {host} if word in " ".join(process.cmdline()) else set()
    return found


def running(client: subprocess.Popen[str]) -> None:
    """Fail if a client has ended. Returns: None."""
    if client.poll() is not None:
        pytest.fail(f"the client has ended: {client.communicate()[1]}")


def read_until(client: subprocess.Popen[str], words: str) -> str:
    """The line of a client's stderr that has these words."""
    assert client.stderr is not None
    lines = []
    for line in client.stderr:
        if words in line:
            return line
        lines.append(line)
    pytest.fail(f"the client has ended without '{words}': {''.join(lines)}")


def scores_of(text: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in score.items() if key != "time"}
        for model in json.loads(text)["models"]
        for score in model["scores"]
    ]


def answers_of(text: str) -> str:
    [model] = json.loads(text)["models"]
    [score] = model["scores"]
    return (Path(model["folder"]) / score["examples"]).read_text()


def test_eval__a_worker_on_each_of_two_hosts__scores_as_on_this_machine(hosts: Hosts, home: Path) -> None:
    command = ("eval", "tiny", "--tasks", "river.yaml", "--workers", "2", "-o", "json")
    client = start_forge(*command, "--cluster", "lab", cwd=home)
    wait_for(lambda: hosts_with(hosts, "ShardWorkerActor") == {0, 1} or running(client), timeout_s=300)
    far, said = client.communicate(timeout=400)
    assert client.returncode == 0, said
    assert "sending tiny" in said
    assert f"{NUM_SHARDS} shards answered by 2 workers" in said, said
    near = forge(*command, cwd=home, env=environment(home, FORGE_CACHE=str(home / "near")), timeout_s=400)
    assert near.returncode == 0, near.stderr
    assert scores_of(far) == scores_of(near.stdout)
    assert answers_of(far) == answers_of(near.stdout)


def test_serve__a_replica_on_each_of_two_hosts__is_reached_watched_and_stopped(hosts: Hosts, home: Path) -> None:
    port, other = free_port("127.0.0.1"), free_port("127.0.0.1")
    start_options = ("--name", "far", "--port", port, "--replicas", "2", "--cluster", "lab")
    client = start_forge("serve", "tiny", *map(str, start_options), cwd=home)
    read_until(client, f"reached from this machine at http://127.0.0.1:{port}/v1")
    assert hosts_with(hosts, "ServeReplica") == {0, 1}
    expected = [
        each.text
        for each in sorted(
            generate(load(home / "tiny"), PROMPTS, SamplingParams(max_tokens=12, temperature=0.0)),
            key=lambda g: g.index,
        )
    ]

    def complete(prompt: str) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, trust_env=False, timeout=120)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(4):  # each replica gets some
            assert list(pool.map(complete, PROMPTS)) == expected
    [shown] = json.loads(forge("serve", "status", "far", "-o", "json", cwd=home, timeout_s=400).stdout)
    assert (shown["state"], shown["cluster"], shown["replicas"]) == ("ready", "lab", 2)
    assert shown["completion_tokens"] >= 4 * len(PROMPTS)
    listed = forge("cluster", "status", "lab", cwd=home, timeout_s=400)
    assert listed.returncode == 0, listed.stderr
    connection = start_forge("serve", "connect", "far", "--port", str(other), cwd=home)
    read_until(connection, f"127.0.0.1:{other}/v1")
    assert httpx.get(f"http://127.0.0.1:{other}/health", trust_env=False, timeout=60).status_code == 200
    connection.send_signal(signal.SIGINT)
    connection.communicate(timeout=60)
    stopped = forge("serve", "stop", "far", cwd=home, timeout_s=400)
    assert stopped.returncode == 0 and "stopped: " in stopped.stderr, stopped.stderr
    _, said = client.communicate(timeout=120)
    assert client.returncode == 0 and "running requests are finished" in said, said
    [shown] = json.loads(forge("serve", "status", "far", "-o", "json", cwd=home, timeout_s=400).stdout)
    assert shown["state"] == "stopped"
    wait_for(lambda: not hosts_with(hosts, "ServeReplica"), timeout_s=60)
