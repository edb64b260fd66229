"""The Kubernetes objects of a cluster file: a RayCluster for KubeRay's operator, and the Secret with Ray's token.

Pure: the same file gives the same manifests. The RayCluster is rendered from `ray_cluster.yaml.j2`; this
module contains only what the template needs to look up.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from forge.config.cluster import KubernetesSpec
from forge.config.dump import load_plain

Manifest = dict[str, Any]

HEAD, WORKER = "ray-head", "ray-worker"
"""The names of the containers that Ray runs in."""
DASHBOARD_PORT = 8265
RAY_PORT = 6379
CLUSTER_LABEL = "ray.io/cluster"
"""KubeRay puts it on the pods and services of a cluster; forge puts it on its own objects."""
DIGEST = "forge/digest"
"""The annotation by which a changed cluster file is noticed."""
GRACE_S = 120
"""A pod's grace period. A planned change takes seconds, but a large model's state takes time to move."""

_SPOT_GRACE_S: Mapping[str | None, int] = {"aws": 110, "azure": 25, "gcp": 15, None: 15}
"""How much of that a reclaimed spot node leaves to its pods, by cloud. AWS reclaims a node two minutes after its
notice, part of which passes before the drain begins; Azure after 30 s; GKE's kubelet leaves 15 of its 30 s to pods
that are not the system's. For an unknown cloud the shortest is assumed.
Source: documentation of GKE, "Spot VMs"; EC2, "Spot Instance interruption notices"; Azure, "Scheduled Events"."""

_SPOT_LABELS: Mapping[str | None, Mapping[str, str]] = {
    "aws": {"karpenter.sh/capacity-type": "spot", "eks.amazonaws.com/capacityType": "SPOT"},
    "gcp": {"cloud.google.com/gke-spot": "true"},
    "azure": {"kubernetes.azure.com/scalesetpriority": "spot"},
}
"""The labels of spot nodes. EKS has one or the other, depending on whether Karpenter or a node group started it."""

_GKE_GPUS: Mapping[str, str] = {
    "B200": "nvidia-b200",
    "H200": "nvidia-h200-141gb",
    "H100-80GB": "nvidia-h100-80gb",
    "A100-80GB": "nvidia-a100-80gb",
    "A100-40GB": "nvidia-tesla-a100",
    "L4": "nvidia-l4",
    "T4": "nvidia-tesla-t4",
    "V100-16GB": "nvidia-tesla-v100",
}
"""GKE's names of GPUs; the other clouds have no such label.
Source: GKE's documentation, "About GPUs", values of `cloud.google.com/gke-accelerator`."""

_OBJECT_STORE_BYTES = 512 * 2**20
"""Shared memory for Ray's objects; forge passes none of its tensors through them."""


def cluster_name(spec: KubernetesSpec) -> str:
    """The RayCluster's name; Kubernetes requires a letter first."""
    return spec.name if spec.name[0].isalpha() else f"c{spec.name}"


def secret_name(spec: KubernetesSpec) -> str:
    """The name of the Secret with Ray's token."""
    return f"{cluster_name(spec)}-token"


def ray_cluster(spec: KubernetesSpec, *, ray_version: str) -> Manifest:
    """The RayCluster of a cluster file, annotated with its own digest.

    Args:
        ray_version: Ray's version in the image and on this machine, which must be equal.
    """
    from jinja2 import Environment, StrictUndefined  # imported here: only this provider needs it

    environment = Environment(undefined=StrictUndefined, autoescape=False)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    text = environment.from_string(files(__package__).joinpath("ray_cluster.yaml.j2").read_text()).render(
        spec=spec,
        name=cluster_name(spec),
        secret_name=secret_name(spec),
        ray_version=ray_version,
        ray_port=RAY_PORT,
        dashboard_port=DASHBOARD_PORT,
        object_store_bytes=_OBJECT_STORE_BYTES,
        grace_s=GRACE_S,
        spot_grace_s=_SPOT_GRACE_S[spec.cloud],
        spot_labels=_SPOT_LABELS.get(spec.cloud, {}),
        node_selector=_node_selector(spec),
    )
    manifest: Manifest = json.loads(json.dumps(load_plain(text)))  # anchors become copies
    manifest["metadata"]["annotations"][DIGEST] = _digest(manifest)
    return manifest


def with_live_size(manifest: Manifest, live: Mapping[str, Any]) -> Manifest:
    """The RayCluster with the live number of workers, which only the autoscaler may change."""
    sizes = {group["groupName"]: group for group in live["spec"].get("workerGroupSpecs", ())}
    groups = []
    for group in manifest["spec"]["workerGroupSpecs"]:
        now = sizes.get(group["groupName"], {})
        kept = {key: now[key] for key in ("replicas", "scaleStrategy") if key in now}
        if "replicas" in kept:
            kept["replicas"] = min(max(kept["replicas"], group["minReplicas"]), group["maxReplicas"])
        groups.append(group | kept)
    return {**manifest, "spec": {**manifest["spec"], "workerGroupSpecs": groups}}


def token_secret(spec: KubernetesSpec, *, token: str) -> Manifest:
    """The Secret with Ray's token. It is never printed, and reaches kubectl only through standard input."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": secret_name(spec),
            "namespace": spec.namespace,
            "labels": {"app.kubernetes.io/managed-by": "forge", CLUSTER_LABEL: cluster_name(spec)},
        },
        "type": "Opaque",
        "data": {"auth_token": base64.b64encode(token.encode()).decode()},
    }


def _node_selector(spec: KubernetesSpec) -> dict[str, str]:
    """Return the node labels that workers require; for alternatives the template uses an affinity."""
    if spec.node_selector:
        return dict(spec.node_selector)
    selector = dict(_SPOT_LABELS[spec.cloud]) if spec.spot and spec.cloud in ("gcp", "azure") else {}
    if spec.cloud == "gcp" and spec.gpu in _GKE_GPUS:
        selector["cloud.google.com/gke-accelerator"] = _GKE_GPUS[spec.gpu]
    return selector


def _digest(manifest: Manifest) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=8).hexdigest()
