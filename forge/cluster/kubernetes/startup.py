"""Wait until the head of a RayCluster is ready, and explain why it is not.

Forge polls instead of `kubectl wait`, which cannot distinguish a slow pod from one that will never start, and
reports nothing while it waits.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge.cluster.base import NodeProgress, OnProgress
from forge.cluster.kubernetes.kubectl import Kubectl
from forge.cluster.kubernetes.pods import Pod, parse_pod
from forge.errors import ClusterError

_MAX_ENDED_HEADS = 2
"""Stop waiting after this many heads have ended; KubeRay replaces a head, and the first may be evicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait, in seconds."""

    up_s: float = 1200.0
    """For the head: a node may have to be rented for it, and a large image pulled."""
    down_s: float = 120.0
    """For everything to be gone."""
    poll_s: float = 1.0
    """Between two requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """What Kubernetes has of a cluster."""

    cluster: Mapping[str, Any] | None
    """The RayCluster."""
    pods: list[Pod]
    """The head first."""


def list_objects(kubectl: Kubectl, *, label: str) -> Objects:
    """Ask for the RayCluster and its pods. Raises: ClusterError as `Kubectl.request`."""
    found = kubectl.find("rayclusters.ray.io,pods", label=label)
    pods = [parse_pod(one) for one in found if one["kind"] == "Pod"]
    pods.sort(key=lambda pod: (not pod.is_head, pod.name))
    return Objects(cluster=next((one for one in found if one["kind"] == "RayCluster"), None), pods=pods)


def await_head(kubectl: Kubectl, *, name: str, label: str, timeouts: Timeouts, on_progress: OnProgress) -> None:
    """Wait until the head is ready.

    Args:
        name: the cluster's name in its file.
        label: the label that selects its objects.

    Raises: ClusterError if the head cannot start, is not ready in time, or runs without Ray's token.
    """
    deadline, shown = time.monotonic() + timeouts.up_s, dict[str, str]()
    ended: set[str] = set()
    while True:
        found = list_objects(kubectl, label=label)
        for pod in found.pods:
            if shown.get(pod.name) != pod.progress:
                shown[pod.name] = pod.progress
                on_progress(NodeProgress(name=pod.name, message=pod.progress, is_failure=bool(pod.problem)))
        head = _newest_head(found.pods)
        if head is not None and head.state == "gone":
            ended.add(head.name)
        if head is not None and head.problem and (head.state != "gone" or len(ended) >= _MAX_ENDED_HEADS):
            raise ClusterError(
                f"the head of '{name}' cannot start: {head.problem}. {inspect_hint(kubectl, name=name, pod=head)}"
            )
        if head is not None and head.state == "alive":
            return _require_token(head, name=name)
        if found.cluster is None:
            raise ClusterError(f"the RayCluster of '{name}' was deleted while its head was starting")
        if time.monotonic() > deadline:
            raise _timed_out(kubectl, head, found.cluster.get("status", {}), name=name, waited_s=timeouts.up_s)
        time.sleep(timeouts.poll_s)


def inspect_hint(kubectl: Kubectl, *, name: str, pod: Pod) -> str:
    """What to do about a pod that does not run."""
    describe = shlex.join(kubectl.command("describe", "pod", pod.name))
    return f"Inspect it: {describe}. What was started stays; stop it: forge cluster down {name}"


def _newest_head(pods: list[Pod]) -> Pod | None:
    heads = [pod for pod in pods if pod.is_head and pod.state != "ending"]
    return min(heads, key=lambda pod: ("alive", "starting", "gone").index(pod.state), default=None)


def _require_token(head: Pod, *, name: str) -> None:
    """Raises: ClusterError if Ray runs without its token, because every pod in Kubernetes could use it then."""
    if head.environment.get("RAY_AUTH_MODE") != "token":
        raise ClusterError(
            f"the KubeRay operator has started '{name}' without Ray's token: it is older than 1.6. Stop the "
            f"cluster now, forge cluster down {name}, and update the operator: docs/kubernetes.md"
        )


def _timed_out(
    kubectl: Kubectl, head: Pod | None, status: Mapping[str, Any], *, name: str, waited_s: float
) -> ClusterError:
    waited = f"the head of '{name}' was not ready within {waited_s:.0f} s"
    if head is not None:
        return ClusterError(f"{waited}: {head.progress}. {inspect_hint(kubectl, name=name, pod=head)}")
    if reason := status.get("reason"):
        return ClusterError(f"{waited}: the operator reports: {reason}. Stop it: forge cluster down {name}")
    return ClusterError(
        f"{waited}: it has no pod, so no KubeRay operator is running: kubectl get pods --all-namespaces --selector "
        f"app.kubernetes.io/name=kuberay-operator. The RayCluster stays; stop it: forge cluster down {name}"
    )
