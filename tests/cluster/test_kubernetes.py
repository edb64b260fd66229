"""A cluster of pods, from `up` to `down`, with a fake kubectl and a fake KubeRay operator."""

from __future__ import annotations

import base64
import http.server
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.base import NodeProgress, cluster_lock, delete_state, read_record, token_path
from forge.cluster.kubernetes.provider import KubernetesCluster
from forge.cluster.kubernetes.startup import Timeouts
from forge.cluster.registry import find_cluster
from forge.config.cluster import KubernetesSpec
from forge.errors import ClusterError
from forge.units import Range
from tests.support.command import environment, forge, wait_for
from tests.support.kubernetes import Kubernetes

SHORT = Timeouts(up_s=10, down_s=0.4, poll_s=0.01)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubernetes:
    kubernetes = Kubernetes(tmp_path / "kubernetes")
    for name, value in kubernetes.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return kubernetes


def pods(*, timeouts: Timeouts = SHORT, **changes: Any) -> KubernetesCluster:
    values: dict[str, Any] = {"name": "pods", "provider": "kubernetes", "image": "registry.example/forge:1"}
    return KubernetesCluster(KubernetesSpec.model_validate(values | changes, strict=False), timeouts=timeouts)


def ignore(_: NodeProgress) -> None:
    pass


def refused(cluster: KubernetesCluster) -> str:
    with pytest.raises(ClusterError) as error:
        cluster.up(on_progress=ignore)
    return str(error.value)


def num_applied(world: Kubernetes) -> int:
    return sum("apply" in call for call in world.calls())


def test_up__waits_until_the_head_is_ready_and_shows_progress(world: Kubernetes) -> None:
    progress: list[NodeProgress] = []
    status = pods(workers=Range(low=2, high=4), usd_per_hour=1.5).up(on_progress=progress.append)
    assert [(node.kind, node.state) for node in status.nodes] == [
        ("head", "alive"),
        ("worker", "alive"),
        ("worker", "alive"),
    ]
    assert status.address == "10.0.0.7:6379" and status.usd_per_hour == 3.0
    shown = [one.message for one in progress if one.name == "pods-head-0"]
    assert shown == ["pulling the image", "ready"]
    assert [node.num_cpus for node in status.nodes] == [0, 8, 8]


def test_up__again__applies_nothing_and_keeps_the_autoscalers_pods(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    world.resize(3)
    before = pods().status()
    assert len(before.nodes) == 4
    applied = num_applied(world)
    wait_for(lambda: all(node.state == "alive" for node in pods().status().nodes), timeout_s=5)
    pods().up(on_progress=ignore)
    assert num_applied(world) == applied
    assert [node.name for node in pods().status().nodes] == [node.name for node in before.nodes]


def test_up__changed_file__is_applied_and_keeps_running_pods(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    world.resize(3)
    names = [node.name for node in pods().status().nodes]
    pods(workers=Range(low=0, high=9)).up(on_progress=ignore)
    (cluster,) = world.things("RayCluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert (group["replicas"], group["maxReplicas"]) == (3, 9)
    assert [node.name for node in pods().status().nodes] == names


def test_up__another_up_is_running__is_refused(world: Kubernetes) -> None:
    with cluster_lock("pods"):
        assert "another forge process is starting or stopping" in refused(pods())
    assert world.calls() == []


def test_up__fails_early__down_finds_the_cluster(world: Kubernetes) -> None:
    world.change(forbidden=["patch secrets"])
    refused(pods(workers=Range(low=0, high=9)))
    assert world.things("RayCluster") == []
    found = find_cluster("pods")
    assert isinstance(found, KubernetesCluster) and found.down(on_progress=ignore) == []
    assert read_record("pods") is None


def test_context__changed_after_up__is_ignored(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    world.change(current="other")
    pods().status()
    pods().up(on_progress=ignore)
    contexts = {call[call.index("--context") + 1] for call in world.calls() if "--context" in call}
    assert contexts == {"kind"}


@pytest.mark.parametrize(
    ("wrong", "changes", "messages"),
    [
        ({"current": None}, {}, ["kubectl has no current context", "kubectl config use-context", "--dry-run"]),
        ({}, {"context": "mine"}, ["does not know the context", "kubectl config get-contexts"]),
        ({"is_reachable": False}, {}, ["cannot be reached", "was refused", "--context kind --namespace default"]),
        ({"is_known": False}, {}, ["does not accept your credentials", "log in again"]),
        ({"has_kuberay": False}, {}, ["operator is not installed", "helm upgrade --install kuberay-operator"]),
        ({"knows_tokens": False}, {}, ["older than 1.6", "secretName", "helm upgrade --install"]),
        ({}, {"namespace": "training"}, ["namespace training does not exist", "kubectl create namespace training"]),
        (
            {"forbidden": ["patch rayclusters"]},
            {},
            ["does not allow it", "the right to patch rayclusters", "kubectl auth can-i patch rayclusters"],
        ),
        (
            {"forbidden": ["get secrets"]},
            {},
            ["does not allow it", "the right to get secrets", "kubectl auth can-i get secrets --namespace default"],
        ),
        ({"head": "no-image"}, {}, ["ImagePullBackOff", "registry.example/forge:1", "describe pod pods-head-0"]),
        ({"head": "ends"}, {}, ["has ended with exit code 1", "forge cluster down pods"]),
        ({"head": "pending"}, {}, ["was not ready within", "3 Insufficient cpu", "What was started stays"]),
        ({"works": False}, {}, ["no KubeRay operator is running", "app.kubernetes.io/name=kuberay-operator"]),
    ],
    ids=str,
)
def test_up__fails__says_why_and_what_to_do(
    world: Kubernetes, wrong: dict[str, Any], changes: dict[str, Any], messages: list[str]
) -> None:
    world.change(**wrong)
    never_ready = "works" in wrong or wrong.get("head") == "pending"
    error = refused(pods(timeouts=Timeouts(up_s=0.5 if never_ready else 10, poll_s=0.01), **changes))
    for message in messages:
        assert message in error


def test_kubectl__not_installed__says_so(world: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(world.folder))
    assert "kubectl is not installed on this machine" in refused(pods())
    with pytest.raises(ClusterError, match="kubectl is not installed on this machine"):
        pods(context="kind").status()


@pytest.mark.parametrize("failure", ["bad-first-pull", "ends-once"])
def test_up__temporary_failure__is_waited_out(world: Kubernetes, failure: str) -> None:
    world.change(head=failure)
    assert pods().up(on_progress=ignore).nodes[0].state == "alive"


def test_up__operator_starts_ray_without_token__is_refused(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    for pod in world.things("Pod"):
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in pod["spec"]["containers"][0]["env"]
        pod["spec"]["containers"][0]["env"] = []
        (world.folder / "things.json").write_text(
            json.dumps([pod, *world.things("RayCluster"), *world.things("Secret")])
        )
    assert "without Ray's token" in refused(pods())


def test_up__foreign_raycluster__is_left_alone(world: Kubernetes) -> None:
    world.put({"kind": "RayCluster", "metadata": {"name": "pods"}, "spec": {"workerGroupSpecs": []}})
    world.change(works=False)
    assert "that forge did not create; choose another name" in refused(pods())
    assert world.things("Secret") == [] and read_record("pods") is None


def test_down__foreign_raycluster__is_left_alone(world: Kubernetes) -> None:
    world.put({"kind": "RayCluster", "metadata": {"name": "pods"}, "spec": {"workerGroupSpecs": []}})
    labels = {"ray.io/cluster": "pods", "ray.io/node-type": "head"}
    world.put({"kind": "Pod", "metadata": {"name": "pods-head", "labels": labels}, "spec": {"containers": [{}]}})
    world.change(works=False)
    assert pods().down(on_progress=ignore) == []
    assert len(world.things("RayCluster")) == len(world.things("Pod")) == 1
    assert not any("delete" in call for call in world.calls())


def test_up__file_moved_to_another_namespace__never_sends_the_token_there(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    num_calls = len(world.calls())
    assert "forge cluster down pods first" in refused(pods(namespace="attackers-own"))
    assert len(world.calls()) == num_calls


def test_up__terminating_raycluster__is_refused(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    world.change(stays=["RayCluster"])
    left = pods().down(on_progress=ignore)
    assert left == ["raycluster pods in default, terminating since 2026-01-01T00:00:00Z"]
    assert "has been terminating since" in refused(pods())


def test_down__leaves_nothing_and_deletes_the_state(world: Kubernetes) -> None:
    pods(workers=Range(low=2, high=2)).up(on_progress=ignore)
    token = token_path("pods")
    assert token.exists() and world.things("Service")
    assert pods().down(on_progress=ignore) == []
    assert (world.folder / "things.json").read_text() == "[]"
    assert read_record("pods") is None and not token.exists()
    assert pods().down(on_progress=ignore) == []


def test_down__objects_stay__lists_them_and_keeps_the_record(world: Kubernetes) -> None:
    pods(workers=Range(low=1, high=2)).up(on_progress=ignore)
    world.change(stays=["Pod", "Secret"])
    left = pods().down(on_progress=ignore)
    assert {line.split()[0] for line in left} == {"pod", "secret"} and len(left) == 3
    assert all("terminating since" in line for line in left)
    assert read_record("pods") is not None
    world.change()
    assert pods().down(on_progress=ignore) == []


def test_down__operator_uninstalled__works(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    world.change(has_kuberay=False, works=False)
    assert pods().down(on_progress=ignore) == []
    assert world.things("Secret") == [] and world.things("Pod") == []


def test_down__cannot_list__fails_and_keeps_the_record(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    world.change(forbidden=["list secrets"])
    with pytest.raises(ClusterError, match="right to list secrets"):
        pods().down(on_progress=ignore)
    assert read_record("pods") is not None


def test_on_head__has_the_pods_environment_and_stdin(world: Kubernetes) -> None:
    cluster = pods(storage="s3://bucket/runs")
    cluster.up(on_progress=ignore)
    program = (
        "import os, sys; data = sys.stdin.buffer.read(); "
        "print(len(data), os.environ['FORGE_STORAGE'], os.environ['RAY_AUTH_MODE'], os.environ['RAY_AUTH_TOKEN'])"
    )
    done = cluster.on_head(["python", "-c", program], stdin=bytes(range(256)) * 1000)
    assert done.returncode == 0
    assert done.stdout.decode().split() == ["256000", "s3://bucket/runs", "token", cluster.token()]


def test_on_head__open_file__is_read_from_its_position(world: Kubernetes, tmp_path: Path) -> None:
    pods().up(on_progress=ignore)
    path = tmp_path / "file"
    path.write_bytes(b"first\nsecond\n")
    with path.open("rb", buffering=0) as file:
        file.seek(6)
        assert pods().on_head(["cat"], stdin=file).stdout == b"second\n"


def test_on_head__command_fails__returns_but_kubectl_fails__raises(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    done = pods().on_head(["python", "-c", "import sys; sys.exit('no such run')"])
    assert (done.returncode, done.stderr) == (1, b"no such run\n")
    world.change(is_reachable=False)
    with pytest.raises(ClusterError, match="cannot be reached"):
        pods().on_head(["true"])
    world.change()
    with pytest.raises(ClusterError, match="did not answer within 0 s"):
        pods().on_head(["sleep", "5"], timeout_s=0.3)


def test_on_head__no_head_or_not_ready__says_so(world: Kubernetes) -> None:
    with pytest.raises(ClusterError, match="is not up"):
        pods().on_head(["true"])
    world.change(head="pending")
    refused(pods(timeouts=Timeouts(up_s=0.1, poll_s=0.01)))
    with pytest.raises(ClusterError, match="does not run: waiting for a node"), pods().job_server():
        pass


RAY_SAYS = {
    "/api/v0/nodes": {
        "data": {
            "result": {
                "result": [
                    {"node_id": "aa", "node_ip": "10.0.0.7", "is_head_node": True, "state": "ALIVE"},
                    {"node_id": "bb", "node_ip": "10.0.0.8", "state": "DEAD", "resources_total": {"CPU": 8.0}},
                    {"node_id": "cc", "node_ip": "10.0.0.8", "state": "ALIVE", "resources_total": {"CPU": 8.0}},
                ]
            }
        }
    },
    "/api/v0/placement_groups": {
        "data": {
            "result": {
                "result": [{"state": "CREATED", "bundles": [{"node_id": "cc", "unit_resources": {"CPU": 4.0}}]}]
            }
        }
    },
    "/nodes": {
        "data": {"nodeLogicalResources": {"cc": "2.0/8.0 CPU (0.0 used of 4.0 reserved in placement groups)"}}
    },
    "/api/v0/actors": {"data": {"result": {"result": [{"name": "supervisor-run-1", "state": "ALIVE"}]}}},
}


class _Guarded(http.server.BaseHTTPRequestHandler):
    """A job server that requires its token."""

    token = ""

    def do_GET(self) -> None:
        self.send_response(200 if self.headers["Authorization"] == f"Bearer {self.token}" else 401)
        self.end_headers()
        self.wfile.write(json.dumps(RAY_SAYS.get(self.path.partition("?")[0], "hello")).encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Guarded) as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


def test_job_server__is_reached_on_loopback_while_open(
    world: Kubernetes, server: http.server.ThreadingHTTPServer
) -> None:
    world.change(port=server.server_port)
    cluster = pods()
    cluster.up(on_progress=ignore)
    _Guarded.token = cluster.token()
    with cluster.job_server() as url:
        assert url.startswith("http://127.0.0.1:") and not url.endswith(f":{server.server_port}")
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {cluster.token()}"})
        for _ in range(2):
            with urllib.request.urlopen(request, timeout=5) as response:
                assert json.load(response) == "hello"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url, timeout=5)
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_status__ray_answers__adds_its_nodes_and_runs(
    world: Kubernetes, server: http.server.ThreadingHTTPServer
) -> None:
    cluster = pods(workers=Range(low=1, high=4), usd_per_hour=1.5, gpu="A100-80GB")
    bare = cluster.up(on_progress=ignore)
    assert bare.runs == () and [node.node_id for node in bare.nodes] == ["", ""]
    world.change(port=server.server_port)
    _Guarded.token = cluster.token()
    status = cluster.status()
    assert status.runs == ("run-1",)
    shown = [(node.name, node.node_id, node.free_cpus, node.usd_per_hour) for node in status.nodes]
    assert shown == [("pods-head-0", "aa", 0.0, None), ("pods-worker-1", "cc", 2.0, 1.5)]
    assert (cluster.price(), cluster.gpu, pods().price(), pods().gpu) == (6.0, "A100-80GB", None, None)


def test_shell__opens_in_a_pod__unknown_pod_is_refused(world: Kubernetes) -> None:
    pods(workers=Range(low=1, high=1)).up(on_progress=ignore)
    command = pods().shell(None)
    assert command[:5] == ["kubectl", "--context", "kind", "--namespace", "default"]
    assert command[5:] == ["exec", "--stdin", "--tty", "pods-head-0", "--container", "ray-head", "--", "/bin/bash"]
    assert "ray-worker" in pods().shell("pods-worker-1")
    with pytest.raises(ClusterError, match="no pod x; it has pods-head-0, pods-worker-1"):
        pods().shell("x")
    done = subprocess.run(
        command, input="echo $RAY_AUTH_MODE\n", capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout == "token\n"


def test_token__is_in_no_command_manifest_message_or_record(world: Kubernetes) -> None:
    progress: list[NodeProgress] = []
    cluster = pods()
    cluster.up(on_progress=progress.append)
    cluster.on_head(["true"])
    with pytest.raises(ClusterError) as error:
        world.change(forbidden=["get secrets"])
        cluster.up(on_progress=progress.append)
    token = cluster.token()
    assert len(token) == 64
    (secret,) = world.things("Secret")
    encoded = secret["data"]["auth_token"]
    assert base64.b64decode(encoded).decode() == token
    texts = [json.dumps(world.calls()), cluster.to_yaml(), str(error.value), *(one.message for one in progress)]
    texts.append(json.dumps([thing for kind in ("RayCluster", "Pod") for thing in world.things(kind)]))
    record = read_record("pods")
    texts.append(repr(record))
    assert not [text for text in texts if token in text or encoded in text]
    assert "annotations" not in secret["metadata"]
    assert stat.S_IMODE(token_path("pods").stat().st_mode) == 0o600


def test_token__another_machine__gets_it_by_up(
    world: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods().up(on_progress=ignore)
    token = pods().token()
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "elsewhere"))
    with pytest.raises(ClusterError, match="fetch it from the cluster: forge cluster up"):
        pods().token()
    pods().up(on_progress=ignore)
    assert pods().token() == token
    assert stat.S_IMODE(token_path("pods").stat().st_mode) == 0o600


def test_up__secret_without_token__is_refused(world: Kubernetes) -> None:
    pods().up(on_progress=ignore)
    delete_state("pods")
    things = json.loads((world.folder / "things.json").read_text())
    for thing in things:
        if thing["kind"] == "Secret":
            thing["data"] = {}
    (world.folder / "things.json").write_text(json.dumps(things))
    assert "pods-token has no token" in refused(pods())


def test_up__ctrl_c_while_waiting__down_finds_everything(world: Kubernetes) -> None:
    world.change(head="pending")
    program = (
        "from tests.cluster.test_kubernetes import pods, ignore, Timeouts\n"
        "pods(timeouts=Timeouts(up_s=60, poll_s=0.05))"
        ".up(on_progress=lambda one: print(one.message, flush=True))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    ) as up:
        try:
            assert up.stdout is not None
            while "waiting for a node" not in (line := up.stdout.readline()):
                assert line, "it ended without waiting"
            os.killpg(up.pid, signal.SIGINT)  # as a terminal does: kubectl gets it too
            assert up.wait(timeout=10) != 0
        finally:
            up.kill()
    found = find_cluster("pods")
    assert world.things("RayCluster")
    assert found.down(on_progress=ignore) == []
    assert (world.folder / "things.json").read_text() == "[]"


@pytest.mark.slow
def test_cli__dry_run_up_and_down__work_on_the_shipped_file(world: Kubernetes, tmp_path: Path) -> None:
    """As a user runs them, with the shipped file."""
    file = Path(__file__).parents[2] / "cluster" / "kubernetes.yaml"
    env = environment(tmp_path) | world.environment()
    shown = forge("cluster", "up", file, "--dry-run", cwd=tmp_path, env=env)
    assert shown.returncode == 0 and "kind: RayCluster" in shown.stdout and world.calls() == []
    world.change(current=None)
    refused = forge("cluster", "up", file, cwd=tmp_path, env=env)
    assert refused.returncode == 3 and "kubectl has no current context" in refused.stderr
    world.change()
    up = forge("cluster", "up", file, "-o", "json", cwd=tmp_path, env=env)
    assert up.returncode == 0, up.stderr
    assert [node["kind"] for node in json.loads(up.stdout)["nodes"]] == ["head"]
    down = forge("cluster", "down", "pods", cwd=tmp_path, env=env)
    assert down.returncode == 0 and "nothing is left of it" in down.stderr + down.stdout
    assert world.things("Pod") == []
