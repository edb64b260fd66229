"""A Kubernetes cluster file as what KubeRay's operator reads: a RayCluster, a RayJob, and the token's Secret.

Pure: a spec goes in, plain values come out, and the same spec gives the same manifest. One on-demand head that
takes no ranks, and one group of workers that Ray's autoscaler makes larger and smaller. A worker's first process
is `forge.elastic.preemption.pod_init`, so that the end of its pod is a notice first. Nobody has a privilege in
any of them.

Field names are those of KubeRay's CRDs for `ray.io/v1`; `authOptions.secretName` is there since KubeRay 1.6.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from forge.config.cluster import KubernetesSpec
from forge.errors import ArgumentError

Manifest = dict[str, Any]

HEAD, WORKER = "ray-head", "ray-worker"
"""The names of the containers that Ray runs in."""
DASHBOARD_PORT = 8265
RAY_PORT = 6379
CLUSTER_LABEL = "ray.io/cluster"
"""KubeRay puts it on the pods and services of a cluster; forge puts it on what it makes itself."""
DIGEST = "forge/digest"
"""The annotation that tells whether a RayCluster is what its file says."""
GRACE_S = 120
"""A pod's time to end by itself: a planned change takes seconds, but what a large model holds must be moved."""

_SPOT_GRACE_S: Mapping[str | None, int] = {"aws": 110, "azure": 25, "gcp": 15, None: 15}
"""What a spot machine's end leaves of that to its pods, by cloud. AWS takes a machine two minutes after its notice,
of which the drain's beginning is part; Azure 30 s; GKE's kubelet leaves 15 s of the 30 s to pods that are not the
system's. Where the cloud is not named it may be the shortest.
Source: documentation of GKE, "Spot VMs"; EC2, "Spot Instance interruption notices"; Azure, "Scheduled Events"."""

_SPOT_LABELS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "aws": (("karpenter.sh/capacity-type", "spot"), ("eks.amazonaws.com/capacityType", "SPOT")),
    "gcp": (("cloud.google.com/gke-spot", "true"),),
    "azure": (("kubernetes.azure.com/scalesetpriority", "spot"),),
}
"""How each cloud marks its spot machines; EKS in one way or the other, by who has started them."""

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
"""GKE's own names of GPUs; no other cloud labels its machines with theirs.
Source: GKE's documentation, "About GPUs", values of `cloud.google.com/gke-accelerator`."""

_HEAD_CPUS, _HEAD_MEMORY_BYTES = 2, 8 * 2**30
"""Room for Ray's control store, its dashboard, a supervisor and the records."""
_OBJECT_STORE_BYTES = 512 * 2**20
"""Shared memory for Ray's objects; forge passes none of its tensors through them."""
_USER_ID = 1000
"""Of the pods' user, as in Ray's own images: Kubernetes must know by number that it is not root."""
_MAX_JOB_NAME = 47
"""Source: KubeRay's MaxRayJobNameLength."""

# The guard is the first process, and bash makes way for Ray: a signal that is passed on reaches Ray itself.
_START_RAY = (
    'ulimit -n 65536; eval "exec ${KUBERAY_GEN_RAY_START_CMD:?the KubeRay operator did not say how Ray is started}"'
)


def cluster_name(spec: KubernetesSpec) -> str:
    """The RayCluster's name; Kubernetes wants a letter first."""
    return spec.name if spec.name[0].isalpha() else f"c{spec.name}"


def secret_name(spec: KubernetesSpec) -> str:
    """Of the Secret with Ray's token."""
    return f"{cluster_name(spec)}-token"


def ray_cluster(spec: KubernetesSpec, *, ray_version: str) -> Manifest:
    """The RayCluster of a cluster file, with a digest of itself.

    Args:
        ray_version: of the image and of this machine, which must be the same.
    """
    manifest: Manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(spec, cluster_name(spec)),
        "spec": {
            "rayVersion": ray_version,
            "authOptions": {"mode": "token", "secretName": secret_name(spec)},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "upscalingMode": "Default",
                "idleTimeoutSeconds": max(1, round(spec.idle_minutes * 60)),
                "securityContext": _no_privilege(),
            },
            "headGroupSpec": _head(spec),
            "workerGroupSpecs": [_workers(spec)],
        },
    }
    # Without it KubeRay would put its own command before the guard. Source: Ray's documentation, "Specify
    # container commands for Ray head/worker Pods".
    annotations = {"ray.io/overwrite-container-cmd": "true", DIGEST: _digest(manifest)}
    manifest["metadata"]["annotations"] = annotations
    return manifest


def with_live_size(manifest: Manifest, live: Mapping[str, Any]) -> Manifest:
    """The RayCluster with as many workers as there are now: how many is the autoscaler's affair."""
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
    """The Secret with Ray's token. It is never printed, and reaches kubectl by its standard input alone."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(spec, secret_name(spec)),
        "type": "Opaque",
        "data": {"auth_token": base64.b64encode(token.encode()).decode()},
    }


def ray_job(spec: KubernetesSpec, *, name: str, entrypoint: str) -> Manifest:
    """A RayJob, which runs a command on the cluster's head, for whoever has kubectl alone.

    The cluster stays when the job is done; its workers end when they are idle.

    Args:
        name: of the job; nothing runs twice under one name.
        entrypoint: a line for the head's shell.

    Raises: ArgumentError if the name is none that Kubernetes takes, or there is no command.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > _MAX_JOB_NAME:
        raise ArgumentError(
            f"a RayJob cannot be called {name!r}: lower-case letters, digits and dashes, at most {_MAX_JOB_NAME}, "
            "a letter first"
        )
    if not entrypoint.strip():
        raise ArgumentError("a RayJob needs a command to run")
    submitter = {
        "name": "ray-job-submitter",
        "image": spec.image,
        "securityContext": _no_privilege(),
        "resources": _resources({"cpu": "500m", "memory": "1Gi"}),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(spec, name),
        "spec": {
            "entrypoint": entrypoint,
            "submissionMode": "K8sJobMode",
            "clusterSelector": {CLUSTER_LABEL: cluster_name(spec)},
            "shutdownAfterJobFinishes": False,
            "backoffLimit": 0,
            "submitterPodTemplate": {
                "spec": _pod() | {"restartPolicy": "Never", "containers": [submitter]},
            },
        },
    }


def _metadata(spec: KubernetesSpec, name: str) -> Manifest:
    return {"name": name, "namespace": spec.namespace, "labels": _labels(spec)}


def _labels(spec: KubernetesSpec) -> dict[str, str]:
    return {"app.kubernetes.io/managed-by": "forge", CLUSTER_LABEL: cluster_name(spec)}


def _head(spec: KubernetesSpec) -> Manifest:
    container = {
        "name": HEAD,
        "image": spec.image,
        "command": ["/bin/bash", "-c", _START_RAY],
        # The others are Ray's client port and Ray Serve's, which nobody needs here.
        "ports": [
            {"name": "gcs-server", "containerPort": RAY_PORT},
            {"name": "dashboard", "containerPort": DASHBOARD_PORT},
        ],
        "env": _environment({"FORGE_STORAGE": spec.storage, "FORGE_MAX_USD_PER_HOUR": spec.max_usd_per_hour}),
        "resources": _resources({"cpu": str(_HEAD_CPUS), "memory": str(_HEAD_MEMORY_BYTES)}),
        "securityContext": _no_privilege(),
        "volumeMounts": [{"name": "shared-mem", "mountPath": "/dev/shm"}],
    }
    pod = _pod() | {
        "terminationGracePeriodSeconds": 30,
        "containers": [container],
        "volumes": [_shared_memory(2 * _OBJECT_STORE_BYTES)],
    }
    # Ray's autoscaler runs beside the head and asks Kubernetes for workers, with an account that KubeRay makes
    # for it and that may touch this cluster's pods alone; it needs the account's token.
    pod["automountServiceAccountToken"] = True
    if avoided := _SPOT_LABELS.get(spec.cloud or ""):
        expressions = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in avoided]
        pod["affinity"] = {"nodeAffinity": _required([expressions])}
    return {
        "serviceType": "ClusterIP",
        # The operator and Ray's nodes reach the dashboard by the pod's address; all of it wants the token.
        "rayStartParams": {
            "num-cpus": "0",
            "dashboard-host": "0.0.0.0",
            "object-store-memory": str(_OBJECT_STORE_BYTES),
        },
        "template": {"metadata": _pod_metadata(), "spec": pod},
    }


def _workers(spec: KubernetesSpec) -> Manifest:
    has_gpu = spec.gpu != "none"
    amounts = {"cpu": str(spec.cpus_per_worker), "memory": str(spec.memory_per_worker)}
    if has_gpu:
        amounts["nvidia.com/gpu"] = str(spec.gpus_per_worker)
    grace_s = _SPOT_GRACE_S[spec.cloud] if spec.spot else GRACE_S
    container = {
        "name": WORKER,
        "image": spec.image,
        "command": ["python", "-P", "-m", "forge.elastic.preemption.pod_init", "/bin/bash", "-c", _START_RAY],
        "env": _environment(
            {
                "FORGE_CLOUD": f"kubernetes,{spec.cloud}" if spec.cloud else "kubernetes",
                "FORGE_GRACE_S": grace_s,
                "FORGE_USD_PER_HOUR": spec.usd_per_hour,
                "FORGE_MAX_USD_PER_HOUR": spec.max_usd_per_hour,
                "FORGE_STORAGE": spec.storage,
            }
        ),
        "resources": _resources(amounts),
        "securityContext": _no_privilege(),
        "volumeMounts": [{"name": "shared-mem", "mountPath": "/dev/shm"}],
    }
    pod = _pod() | {
        "terminationGracePeriodSeconds": GRACE_S,
        "automountServiceAccountToken": False,
        "containers": [container],
        # NCCL's and Ray's; a quarter of the memory, of which it is part. Snapshots have no name there.
        "volumes": [_shared_memory(max(2 * _OBJECT_STORE_BYTES, spec.memory_per_worker // 4))],
        "affinity": _worker_affinity(spec),
        "tolerations": _tolerations(spec),
    }
    if selector := _node_selector(spec):
        pod["nodeSelector"] = selector
    return {
        "groupName": "workers",
        "replicas": spec.workers.low,
        "minReplicas": spec.workers.low,
        "maxReplicas": spec.workers.high,
        "rayStartParams": {"object-store-memory": str(_OBJECT_STORE_BYTES)},
        "template": {"metadata": _pod_metadata(), "spec": pod},
    }


def _pod() -> Manifest:
    """What every pod has: it is not root, and knows nothing of Kubernetes."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _pod_metadata() -> Manifest:
    """Machines are not cleared to save room: idle workers end by themselves, the others are at work."""
    return {
        "annotations": {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
    }


def _no_privilege() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _resources(amounts: Mapping[str, str]) -> Manifest:
    """Requests equal to limits: Ray counts on all of it, and such pods are the last to be evicted."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _environment(values: Mapping[str, object]) -> list[Manifest]:
    """Of a pod; Ray tells nobody else of its use, as on all other clusters."""
    known = {"RAY_USAGE_STATS_ENABLED": "0", **values}
    return [{"name": name, "value": str(value)} for name, value in known.items() if value is not None]


def _shared_memory(size_bytes: int) -> Manifest:
    return {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": str(size_bytes)}}


def _node_selector(spec: KubernetesSpec) -> dict[str, str]:
    if spec.node_selector:
        return dict(spec.node_selector)
    selector: dict[str, str] = {}
    if spec.spot and spec.cloud in ("gcp", "azure"):
        selector |= dict(_SPOT_LABELS[spec.cloud])
    if spec.cloud == "gcp" and spec.gpu in _GKE_GPUS:
        selector["cloud.google.com/gke-accelerator"] = _GKE_GPUS[spec.gpu]
    return selector


def _worker_affinity(spec: KubernetesSpec) -> Manifest:
    """On different machines if it can be: two workers of one machine hold each other's snapshots in vain."""
    others = {"labelSelector": {"matchLabels": {CLUSTER_LABEL: cluster_name(spec), "ray.io/node-type": "worker"}}}
    term = {"weight": 100, "podAffinityTerm": others | {"topologyKey": "kubernetes.io/hostname"}}
    affinity: Manifest = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [term]}}
    if spec.spot and spec.cloud == "aws" and not spec.node_selector:  # one label or the other: no selector says so
        marks = _SPOT_LABELS["aws"]
        affinity["nodeAffinity"] = _required(
            [[{"key": key, "operator": "In", "values": [value]}] for key, value in marks]
        )
    return affinity


def _required(terms: list[list[Manifest]]) -> Manifest:
    """Machines of which one of the terms is true, all expressions of it."""
    return {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": expressions} for expressions in terms]
        }
    }


def _tolerations(spec: KubernetesSpec) -> list[Manifest]:
    """AKS taints its spot machines itself; on the others it is custom, and harmless where it is not."""
    marks = _SPOT_LABELS.get(spec.cloud or "", ()) if spec.spot else ()
    tolerated = [{"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in marks]
    if spec.gpu != "none":
        tolerated.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
        if spec.cloud == "azure":  # Source: AKS's documentation, "Use GPUs", which taints so.
            tolerated.append({"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"})
    return tolerated


def _digest(manifest: Manifest) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=8).hexdigest()
