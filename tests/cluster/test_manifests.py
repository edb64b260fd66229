"""Manifests for KubeRay: valid by its own CRDs, and with the properties that security and preemption need."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from forge.cluster.kubernetes.manifests import (
    DIGEST,
    GRACE_S,
    cluster_name,
    ray_cluster,
    secret_name,
    token_secret,
    with_live_size,
)
from forge.cluster.kubernetes.provider import KubernetesCluster
from forge.config.cluster import KubernetesSpec
from forge.config.dump import dump_plain
from forge.config.load import load_cluster
from forge.units import Range
from tests.support.command import wait_for

ROOT = Path(__file__).parents[2]
CRDS = Path(os.environ.get("FORGE_KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay")
"""KubeRay's CustomResourceDefinitions, which are not part of the project."""
RAY = "2.60.0"

needs_schemas = pytest.mark.skipif(not CRDS.is_dir(), reason=f"KubeRay's schemas are not in {CRDS}")


def spec(**changes: Any) -> KubernetesSpec:
    values: dict[str, Any] = {"name": "pods", "provider": "kubernetes", "image": "registry.example/forge:1"}
    return KubernetesSpec.model_validate(values | changes, strict=False)


EVERYTHING = {
    "namespace": "training",
    "context": "mine",
    "gpu": "A100-80GB",
    "gpus_per_worker": 8,
    "storage": "gs://bucket/runs",
    "usd_per_hour": 12.5,
    "max_usd_per_hour": 100,
    "workers": Range(low=2, high=64),
}
SPECS = [
    {},
    {"name": "4pods"},
    {"spot": False},
    {"node_selector": {"pool": "training"}},
    *({"cloud": cloud, "spot": spot} | EVERYTHING for cloud in ("aws", "gcp", "azure") for spot in (True, False)),
]


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """KubeRay's schema of a kind, as strict as kubectl: an unknown field is refused."""
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the other takes 20 s
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    found: dict[str, Any] = strict(version["schema"]["openAPIV3Schema"])
    found["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return found


def strict(node: Any) -> Any:
    if isinstance(node, list):
        return [strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    closed = {key: strict(value) for key, value in node.items()}
    is_object = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if is_object and "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed


def refusals(manifest: Mapping[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema(manifest["kind"])).iter_errors(manifest)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


def pods_of(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod of a RayCluster."""
    body = manifest["spec"]
    yield body["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in body["workerGroupSpecs"])


def test_ray_cluster__text_with_special_characters__is_kept() -> None:
    storage = "s3://b/yes: no a: 'b' \"c\" <&> é🎉 {{ x }} #"
    manifest = ray_cluster(spec(node_selector={"pool": "yes", "a/b": "1"}, storage=storage), ray_version=RAY)
    head, worker = pods_of(manifest)
    assert worker["nodeSelector"] == {"pool": "yes", "a/b": "1"}
    assert environment_of(head)["FORGE_STORAGE"] == environment_of(worker)["FORGE_STORAGE"] == storage


def worker_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    _, worker = pods_of(manifest)
    return worker


def environment_of(pod: Mapping[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in pod["containers"][0]["env"]}


@needs_schemas
@pytest.mark.parametrize("changes", SPECS, ids=str)
def test_ray_cluster__any_spec__is_valid_by_the_crd(changes: dict[str, Any]) -> None:
    one = spec(**changes)
    assert refusals(ray_cluster(one, ray_version=RAY)) == []


@needs_schemas
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOption"), {"mode": "token"}),
        (("spec", "authOptions", "mode"), "tokn"),
        (("spec", "workerGroupSpecs", 0, "idleTimeout"), 5),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriod"), 5),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "securityContext", "privilege"), True),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "tolerations", 0), {"key": "a", "operater": "Exists"}),
    ],
)
def test_crd__unknown_or_wrong_field__is_refused(path: tuple[str | int, ...], value: object) -> None:
    manifest: Any = ray_cluster(spec(cloud="azure"), ray_version=RAY)
    parent = manifest
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    assert refusals(manifest)


@pytest.mark.parametrize("changes", SPECS, ids=str)
def test_ray_cluster__any_spec__no_pod_has_privileges(changes: dict[str, Any]) -> None:
    one = spec(**changes)
    cluster = ray_cluster(one, ray_version=RAY)
    for pod in pods_of(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(pod)
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in container["securityContext"]
        assert all("hostPath" not in volume for volume in pod.get("volumes", ()))
    assert worker_of(cluster)["automountServiceAccountToken"] is False
    assert cluster["spec"]["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False


def test_ray_cluster__requires_a_token_and_has_no_cpus_on_the_head() -> None:
    body = ray_cluster(spec(), ray_version=RAY)["spec"]
    assert body["authOptions"] == {"mode": "token", "secretName": "pods-token"}
    assert body["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert body["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize(
    ("cloud", "label", "taint"),
    [
        ("gcp", ("cloud.google.com/gke-spot", "true"), "cloud.google.com/gke-spot"),
        ("azure", ("kubernetes.azure.com/scalesetpriority", "spot"), "kubernetes.azure.com/scalesetpriority"),
    ],
)
def test_workers__spot__select_the_clouds_spot_nodes(cloud: str, label: tuple[str, str], taint: str) -> None:
    manifest = ray_cluster(spec(cloud=cloud), ray_version=RAY)
    head, worker = pods_of(manifest)
    assert worker["nodeSelector"] == dict([label])
    assert taint in {one["key"] for one in worker["tolerations"]}
    assert "nodeSelector" not in head and "tolerations" not in head
    (term,) = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term["matchExpressions"] == [{"key": label[0], "operator": "NotIn", "values": [label[1]]}]


def test_workers__spot_on_eks__accept_either_spot_label() -> None:
    head, worker = pods_of(ray_cluster(spec(cloud="aws"), ray_version=RAY))
    required = worker["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    # Terms are alternatives, the expressions of one term are not.
    assert [
        [(one["key"], one["values"]) for one in term["matchExpressions"]] for term in required["nodeSelectorTerms"]
    ] == [
        [("karpenter.sh/capacity-type", ["spot"])],
        [("eks.amazonaws.com/capacityType", ["SPOT"])],
    ]
    (avoided,) = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert [one["operator"] for one in avoided["matchExpressions"]] == ["NotIn", "NotIn"]


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_workers__not_spot__select_no_nodes(cloud: str) -> None:
    worker = worker_of(ray_cluster(spec(cloud=cloud, spot=False), ray_version=RAY))
    assert "nodeSelector" not in worker and "nodeAffinity" not in worker["affinity"] and worker["tolerations"] == []
    assert environment_of(worker)["FORGE_GRACE_S"] == str(GRACE_S)


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_workers__node_selector__replaces_the_clouds_labels(cloud: str) -> None:
    worker = worker_of(ray_cluster(spec(cloud=cloud, node_selector={"pool": "mine"}), ray_version=RAY))
    assert worker["nodeSelector"] == {"pool": "mine"} and "nodeAffinity" not in worker["affinity"]
    assert worker["tolerations"]


def test_workers__gpus__are_requested_whole_and_selected_by_name_on_gke() -> None:
    worker = worker_of(ray_cluster(spec(gpu="A100-80GB", gpus_per_worker=8, cloud="gcp"), ray_version=RAY))
    amounts = worker["containers"][0]["resources"]
    assert amounts["requests"] == amounts["limits"] and amounts["limits"]["nvidia.com/gpu"] == "8"
    assert worker["nodeSelector"]["cloud.google.com/gke-accelerator"] == "nvidia-a100-80gb"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker["tolerations"]
    without = worker_of(ray_cluster(spec(), ray_version=RAY))["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in without


@pytest.mark.parametrize(
    ("changes", "clouds", "most_s"),
    [
        ({}, "kubernetes", 15),
        ({"cloud": "gcp"}, "kubernetes,gcp", 15),
        ({"cloud": "azure"}, "kubernetes,azure", 30),
        ({"cloud": "aws"}, "kubernetes,aws", 120),
        ({"cloud": "aws", "spot": False}, "kubernetes,aws", 120),
    ],
)
def test_workers__grace__is_no_longer_than_the_cloud_leaves(
    changes: dict[str, Any], clouds: str, most_s: float
) -> None:
    worker = worker_of(ray_cluster(spec(**changes), ray_version=RAY))
    values = environment_of(worker)
    assert values["FORGE_CLOUD"] == clouds
    assert 10 < float(values["FORGE_GRACE_S"]) <= min(most_s, worker["terminationGracePeriodSeconds"])
    assert worker["terminationGracePeriodSeconds"] >= 60
    assert "lifecycle" not in worker["containers"][0], "a preStop hook would use up part of the grace period"


def test_environment__has_prices_and_storage() -> None:
    head, worker = pods_of(ray_cluster(spec(**EVERYTHING), ray_version=RAY))
    assert environment_of(head) == {
        "RAY_USAGE_STATS_ENABLED": "0",
        "FORGE_STORAGE": "gs://bucket/runs",
        "FORGE_MAX_USD_PER_HOUR": "100.0",
    }
    assert environment_of(worker)["FORGE_USD_PER_HOUR"] == "12.5"


def test_start_command__ray_of_kuberay__runs_ray_without_open_ports(tmp_path: Path) -> None:
    for pod in pods_of(ray_cluster(spec(), ray_version=RAY)):
        line = pod["containers"][0]["command"][-1]
        python = tmp_path / "python"
        python.write_text('#!/bin/sh\necho "$@"\n')
        python.chmod(0o755)
        command = 'ray start --head --resources="{\\"a\\": 1}" --block'
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "KUBERAY_GEN_RAY_START_CMD": command}
        done = subprocess.run(
            ["/bin/bash", "-c", line], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == '-P -m forge.cluster.ray_cli start --head --resources={"a": 1} --block\n'


def test_worker_command__sigterm__writes_a_notice_and_ends_ray_later(tmp_path: Path) -> None:
    """The very command of the manifest, with a program in Ray's place that tells its pid and its arguments."""
    command = worker_of(ray_cluster(spec(), ray_version=RAY))["containers"][0]["command"]
    ray = tmp_path / "ray.py"
    ray.write_text("import os, sys, time\nprint(os.getpid(), sys.argv[1:], flush=True)\ntime.sleep(60)\n")
    notice = tmp_path / "notice.json"
    environment = os.environ | {
        "FORGE_NOTICE_FILE": str(notice),
        "FORGE_GRACE_S": "4",
        "KUBERAY_GEN_RAY_START_CMD": f'{sys.executable} {ray} --block --resources="{{\\"a\\": 1}}"',
    }
    assert command[0] == "python"
    before = time.time()
    with subprocess.Popen(
        [sys.executable, *command[1:]], env=environment, stdout=subprocess.PIPE, text=True
    ) as guard:
        try:
            assert guard.stdout is not None
            pid, arguments = guard.stdout.readline().split(maxsplit=1)
            assert arguments.strip() == str(["--block", '--resources={"a": 1}'])
            guard.send_signal(signal.SIGTERM)
            wait_for(notice.exists, timeout_s=10)
            values = json.loads(notice.read_text())
            assert values["source"] == "kubernetes" and values["deadline"] == pytest.approx(before + 4, abs=2)
            assert Path(f"/proc/{pid}").exists(), "the training continues"
            assert guard.wait(timeout=15) == 128 + signal.SIGTERM
        finally:
            guard.kill()
    assert not Path(f"/proc/{pid}").exists()


def test_worker_command__no_start_command__fails_with_the_reason() -> None:
    command = worker_of(ray_cluster(spec(), ray_version=RAY))["containers"][0]["command"]
    environment = {name: value for name, value in os.environ.items() if name != "KUBERAY_GEN_RAY_START_CMD"}
    done = subprocess.run(
        [sys.executable, *command[1:]], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0 and "KubeRay operator did not say" in done.stderr


def test_digest__depends_on_the_file_only() -> None:
    first, second = (ray_cluster(spec(), ray_version=RAY) for _ in range(2))
    assert first == second
    other = ray_cluster(spec(cpus_per_worker=9), ray_version=RAY)
    assert first["metadata"]["annotations"][DIGEST] != other["metadata"]["annotations"][DIGEST]


@pytest.mark.parametrize(("now", "then"), [(3, 3), (0, 1), (99, 8)])
def test_with_live_size__keeps_the_autoscalers_number_within_limits(now: int, then: int) -> None:
    manifest = ray_cluster(spec(workers=Range(low=1, high=8)), ray_version=RAY)
    live = {"spec": {"workerGroupSpecs": [{"groupName": "workers", "replicas": now, "scaleStrategy": {}}]}}
    (group,) = with_live_size(manifest, live)["spec"]["workerGroupSpecs"]
    assert group["replicas"] == then and group["scaleStrategy"] == {}
    assert manifest["spec"]["workerGroupSpecs"][0]["replicas"] == 1


def test_cluster_name__digit_first__gets_a_letter() -> None:
    assert cluster_name(spec(name="4pods")) == "c4pods" and secret_name(spec(name="4pods")) == "c4pods-token"
    assert cluster_name(spec()) == "pods"
    # KubeRay cuts names of services at 50 characters.
    assert len(f"{cluster_name(spec(name='4' * 40))}-head-svc") <= 50


def test_to_yaml__is_what_up_applies_and_has_no_token() -> None:
    one = spec(**EVERYTHING, cloud="aws")
    printed = KubernetesCluster(one).to_yaml()
    (cluster,) = yaml.safe_load_all(printed)
    assert cluster == ray_cluster(one, ray_version=cluster["spec"]["rayVersion"])
    assert "kind: Secret" not in printed and "auth_token: " not in printed


def test_token_secret__has_the_key_that_kuberay_reads() -> None:
    secret = token_secret(spec(namespace="training"), token="abc")
    assert secret["data"] == {"auth_token": "YWJj"} and secret["metadata"]["namespace"] == "training"


@pytest.mark.parametrize("text", ["yes", "off", "1e3", "1:30", "0x10", "", "null", "2026-01-01", "a: b", "~"])
def test_dump_plain__ambiguous_text__is_quoted(text: str) -> None:
    dumped = dump_plain({"value": text, "list": [text, text]})
    assert yaml.safe_load(dumped) == {"value": text, "list": [text, text]}
    if text:
        assert f"'{text}'" in dumped


def test_shipped_file__renders() -> None:
    one = load_cluster(ROOT / "cluster" / "kubernetes.yaml")
    assert isinstance(one, KubernetesSpec)
    assert "kind: RayCluster" in KubernetesCluster(one).to_yaml()


def test_shipped_file__shows_every_key(tmp_path: Path) -> None:
    text = (ROOT / "cluster" / "kubernetes.yaml").read_text()
    path = tmp_path / "all.yaml"
    path.write_text(re.sub(r"^# (?=[a-z_]+: )", "", text, flags=re.MULTILINE))
    assert load_cluster(path).model_fields_set == set(KubernetesSpec.model_fields)
