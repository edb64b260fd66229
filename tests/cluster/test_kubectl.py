"""The real kubectl, against a small Kubernetes API of the tests and against none.

Skipped where kubectl is not installed; tests/cluster/test_kubernetes.py uses a fake.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.base import NodeProgress, read_record
from forge.cluster.kubernetes.kubectl import Kubectl
from forge.errors import ClusterError
from forge.units import Range
from tests.cluster.test_kubernetes import ignore, pods, refused
from tests.support.kubernetes import Kubernetes
from tests.support.kubernetes_api import serve

KUBECTL = shutil.which("kubectl") or ""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not KUBECTL, reason="kubectl is not installed")]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    kubernetes = Kubernetes(tmp_path / "kubernetes")
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with serve(kubernetes) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield kubernetes


def test_up_and_down__real_kubectl__work(world: Kubernetes) -> None:
    progress: list[NodeProgress] = []
    status = pods(workers=Range(low=1, high=4)).up(on_progress=progress.append)
    assert [(node.kind, node.state) for node in status.nodes] == [("head", "alive"), ("worker", "alive")]
    (secret,) = world.things("Secret")
    assert base64.b64decode(secret["data"]["auth_token"]).decode() == pods().token()
    assert "annotations" not in secret["metadata"], "kubectl would leave a copy of the token there"
    assert pods().up(on_progress=ignore).nodes == status.nodes
    assert pods().down(on_progress=ignore) == []
    assert (world.folder / "things.json").read_text() == "[]" and read_record("pods") is None
    assert pods().down(on_progress=ignore) == []


def test_down__pods__get_a_short_grace_period(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    world.change(stays=["Pod"])
    assert [line.split()[0] for line in pods().down(on_progress=ignore)] == ["pod"]
    assert [pod["gracePeriodSeconds"] for pod in world.things("Pod")] == [10]


def test_up__changed_file__keeps_the_number_of_workers(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    world.resize(3)
    pods(workers=Range(low=0, high=9)).up(on_progress=ignore)
    (group,) = world.things("RayCluster")[0]["spec"]["workerGroupSpecs"]
    assert (group["replicas"], group["maxReplicas"]) == (3, 9)


def test_on_head__has_stdin_stdout_and_exit_code(world: Kubernetes) -> None:
    cluster = pods(storage="s3://bucket/runs")
    cluster.up(on_progress=ignore)
    data = os.urandom(200_000)
    assert cluster.on_head(["cat"], stdin=data).stdout == data
    program = (
        "import os, sys; print(os.environ['FORGE_STORAGE'], len(os.environ['RAY_AUTH_TOKEN'])); sys.exit('gone')"
    )
    done = cluster.on_head(["python", "-c", program])
    assert (done.returncode, done.stdout, done.stderr) == (1, b"s3://bucket/runs 64\n", b"gone\n")


@pytest.mark.parametrize(
    ("wrong", "changes", "message"),
    [
        ({}, {"context": "mine"}, "does not know the context"),
        ({"has_kuberay": False}, {}, "operator is not installed"),
        ({"knows_tokens": False}, {}, "older than 1.6"),
        ({}, {"namespace": "training"}, "kubectl create namespace training"),
        ({"forbidden": ["patch rayclusters"]}, {}, "kubectl auth can-i patch rayclusters"),
        ({"forbidden": ["list pods"]}, {}, "kubectl auth can-i list pods"),
        ({"head": "no-image"}, {}, "ImagePullBackOff"),
    ],
    ids=str,
)
def test_errors__of_real_kubectl__are_explained(
    world: Kubernetes, wrong: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    world.change(**wrong)
    assert message in refused(pods(**changes))


def test_errors__no_current_context__is_explained(world: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(world.folder / "none"))
    assert "kubectl has no current context" in refused(pods())


def test_errors__server_unreachable__is_explained(world: Kubernetes) -> None:
    config = json.loads((world.folder / "config.json").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    (world.folder / "config.json").write_text(json.dumps(config))
    assert "cannot be reached" in refused(pods())
    with pytest.raises(ClusterError, match="cannot be reached"):
        pods(context="kind").status()


def test_forward__pod_gone__fails(world: Kubernetes) -> None:
    kubectl = Kubectl(namespace="default", context="kind")
    with pytest.raises(ClusterError, match='pods "gone" not found'), kubectl.forward("gone", 8265):
        pass


def test_port_forward_and_shell__real_kubectl__accepts_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API of the tests cannot do these two. A refused connection proves the options right."""
    world = Kubernetes(tmp_path / "stand-in")
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    cluster = pods()
    cluster.up(on_progress=ignore)
    with cluster.job_server():
        pass
    shell = cluster.shell(None)[1:]
    cluster.down(on_progress=ignore)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "kind",
        "contexts": [{"name": "kind", "context": {"cluster": "kind", "user": "me"}}],
        "clusters": [{"name": "kind", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "me", "user": {}}],
    }
    (tmp_path / "config").write_text(json.dumps(config))
    commands = {tuple(call) for call in [*world.calls(), shell] if {"port-forward", "--tty"} & set(call)}
    assert len(commands) == 2
    for command in sorted(commands):
        done = subprocess.run(
            [KUBECTL, *command],
            input='{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}}',
            env=os.environ | {"KUBECONFIG": str(tmp_path / "config"), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert re.search(r"connection refused|was refused", done.stderr) or done.stdout == "kind\n", (command, done)
