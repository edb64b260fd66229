"""A training on pods without Kubernetes: the commands of their containers run on this machine, with a real Ray and
the fake kubectl of `tests.support.kubectl`. One pod gets SIGTERM, as from a kubelet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.cluster.base import make_token
from forge.cluster.kubernetes.manifests import ray_cluster
from forge.config.cluster import KubernetesSpec
from forge.config.dump import dump_plain
from forge.process import free_port
from forge.runs.reader import read_metrics, read_run
from tests.support.command import environment, forge, start_forge, wait_for
from tests.support.kubernetes import Kubernetes

JOB = """\
name: pods
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 100000, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: "1..2", gpu: none}
tracking: {wandb: {mode: disabled}}
"""
FILE = {"name": "pods", "provider": "kubernetes", "image": "registry/forge:1", "workers": "0..2"}


class Pods:
    """The containers of a cluster's pods as processes of this machine; their `ray start` is KubeRay's part."""

    def __init__(self, spec: KubernetesSpec, *, token: str, folder: Path) -> None:
        self._manifest = ray_cluster(spec, ray_version="2.60.0")["spec"]
        self._token, self._folder, self._shared = token, folder, spec.storage
        self.port, self.dashboard = free_port(), free_port()
        self._started: list[subprocess.Popen[bytes]] = []

    def environment(self, template: dict[str, Any]) -> dict[str, str]:
        """A container's environment, with what KubeRay adds and the token from the Secret."""
        known = {one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]}
        known |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return environment(self._folder, PATH=path, HOME=str(self._folder)) | known

    def start(self, group: dict[str, Any], *arguments: str) -> subprocess.Popen[bytes]:
        container = group["template"]["spec"]["containers"][0]
        parameters = group["rayStartParams"] | {"dashboard-agent-listen-port": str(free_port())}
        command = [*arguments, *(f"--{key}={value}" for key, value in parameters.items()), "--block"]
        env = self.environment(group["template"]) | {
            "KUBERAY_GEN_RAY_START_CMD": " ".join(["ray start", *command]),
            "FORGE_NOTICE_FILE": str(self._folder / f"notice-{len(self._started)}.json"),
        }
        log = self._folder / f"pod-{len(self._started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(container["command"], env=env, stdout=output, stderr=output)
        self._started.append(process)
        wait_for(lambda: b"Ray runtime started" in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process

    def start_head(self) -> None:
        head = self._manifest["headGroupSpec"]
        # The dashboard gets a free port on loopback, because other Rays may run on this machine.
        head["rayStartParams"] |= {"dashboard-host": "127.0.0.1", "dashboard-port": str(self.dashboard)}
        self.start(head, "--head", f"--port={self.port}", f"--temp-dir={self._folder / 'ray'}")

    def start_worker(self) -> subprocess.Popen[bytes]:
        (group,) = self._manifest["workerGroupSpecs"]
        group["rayStartParams"]["num-cpus"] = "1"
        return self.start(group, f"--address=127.0.0.1:{self.port}")

    def end(self) -> None:
        for process in reversed(self._started):
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for one in [process, *family]:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            process.wait()
        for one in psutil.process_iter(["cmdline"]):  # the drivers of runs, in their own sessions
            if str(self._shared) in " ".join(one.info["cmdline"] or []):
                with contextlib.suppress(psutil.Error):
                    one.kill()


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    # The paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="pods-") as folder:
        pods = Pods(
            KubernetesSpec.model_validate(FILE | {"storage": str(tmp_path / "shared")}),
            token=make_token("pods"),
            folder=Path(folder),
        )
        try:
            yield pods
        finally:
            pods.end()


@pytest.mark.slow
def test_train__pod_gets_sigterm__run_leaves_it_and_loses_no_step(pods: Pods, tmp_path: Path) -> None:
    pods.start_head()
    going = [pods.start_worker(), pods.start_worker()][0]
    kubernetes = Kubernetes(tmp_path / "kubernetes", port=pods.dashboard)
    (tmp_path / "pods.yaml").write_text(dump_plain(FILE | {"storage": str(tmp_path / "shared")}))
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    env = environment(tmp_path, HOME=str(tmp_path)) | kubernetes.environment()
    up = forge("cluster", "up", "pods.yaml", cwd=tmp_path, env=env)
    assert up.returncode == 0, up.stderr

    client = start_forge("train", "job.yaml", "--cluster", "pods", cwd=tmp_path, env=env)

    def is_gone() -> None:
        assert client.poll() is None, client.communicate()[1]

    folder = wait_for(lambda: next(tmp_path.glob("runs/*/metrics.jsonl"), None) or is_gone()).parent

    def world() -> int:
        steps = read_metrics(folder)
        return int(steps[-1]["elastic/world_size"]) if steps else 0

    wait_for(lambda: world() == 2 or is_gone())
    going.send_signal(signal.SIGTERM)
    wait_for(lambda: world() == 1 or is_gone(), timeout_s=60)
    assert going.poll() is None  # the pod lives on meanwhile
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=90)
    assert client.returncode == 130, err
    run = read_run(folder)
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, run.step + 1))
    notice = run.newest("PreemptionNoticeReceived") or {}
    assert notice.get("source") == "kubernetes", [event["event"] for event in run.events]
    down = forge("cluster", "down", "pods", cwd=tmp_path, env=env)
    assert down.returncode == 0, down.stderr
