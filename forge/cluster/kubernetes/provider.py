"""Pods that the KubeRay operator starts: forge hands it a RayCluster with kubectl, and looks at what comes of it.

What was applied once is left alone, so that another `up` starts nothing twice; how many workers there are is the
autoscaler's affair from then on. Ray's token is in a Secret, which the cluster's file in the state folder follows:
whoever may read Secrets there may use the cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import IO, Any

from forge.cluster.base import (
    ClusterNode,
    ClusterRecord,
    ClusterStatus,
    NodeProgress,
    OnProgress,
    cluster_lock,
    delete_state,
    read_record,
    token_path,
    write_record,
)
from forge.cluster.dashboard import ray_nodes, ray_runs
from forge.cluster.kubernetes.kubectl import Kubectl, current_context
from forge.cluster.kubernetes.manifests import (
    CLUSTER_LABEL,
    DASHBOARD_PORT,
    DIGEST,
    HEAD,
    RAY_PORT,
    WORKER,
    Manifest,
    cluster_name,
    ray_cluster,
    ray_job,
    secret_name,
    with_live_size,
)
from forge.cluster.kubernetes.pods import Pod, pod_of
from forge.cluster.kubernetes.token import share_token
from forge.config.cluster import KubernetesSpec
from forge.config.dump import dump_documents
from forge.errors import ClusterError

_KUBERAY = "rayjobs.ray.io,rayclusters.ray.io"
_MANY_ENDS = 2
"""Heads that have ended while one is waited for: KubeRay starts another, and the first may have been evicted."""
_POD_GRACE_S = 10
"""For pods of a cluster that is taken down: nobody trains there any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long is waited, in seconds."""

    up_s: float = 1200.0
    """For the head: a machine may have to be rented for it, and a large image pulled."""
    down_s: float = 120.0
    """For everything to be gone."""
    poll_s: float = 1.0
    """Between two looks."""


class KubernetesCluster:
    """The RayCluster of a Kubernetes cluster's file."""

    def __init__(self, spec: KubernetesSpec, *, patience: Patience | None = None) -> None:
        self._spec, self._patience = spec, patience or Patience()
        self._label = f"{CLUSTER_LABEL}={cluster_name(spec)}"

    @property
    def name(self) -> str:
        """As its file says."""
        return self._spec.name

    @property
    def shares_files(self) -> bool:
        """Pods have files of their own."""
        return False

    @property
    def gpu(self) -> str | None:
        """As its file says; the head has none."""
        return None if self._spec.gpu == "none" else self._spec.gpu

    def price(self) -> float | None:
        """Of all workers that there may be; what the head costs nobody has said."""
        price = self._spec.usd_per_hour
        return None if price is None else price * self._spec.workers.high

    def to_yaml(self, *, job_name: str = "job", entrypoint: str = "") -> str:
        """The manifests as YAML, for whoever has `kubectl` alone; a RayJob too if there is something to run.

        The token is not among them: its Secret is `up`'s to make, or that of the command in the first lines.
        """
        documents = [self._manifest()]
        if entrypoint:
            documents.append(ray_job(self._spec, name=job_name, entrypoint=entrypoint))
        where = Kubectl(namespace=self._spec.namespace, context=self._spec.context)
        by_hand = " ".join(
            where.command(
                "create", "secret", "generic", secret_name(self._spec), "--from-file=auth_token=/dev/stdin"
            )
        )
        note = (
            "# Ray's token is in a Secret, which `forge cluster up` makes and nothing prints. To make it by hand:\n"
            f"#   openssl rand -hex 32 | tr -d '\\n' | {by_hand}\n"
        )
        return note + dump_documents(documents)

    def token(self) -> str:
        """Of its Ray. Raises: ClusterError if the cluster was not started from here."""
        try:
            return token_path(self.name).read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"the token of '{self.name}' is not here: {error.strerror}; fetch it from the cluster: "
                "forge cluster up with its file"
            ) from error

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Hand the RayCluster to Kubernetes, and wait until its head is ready.

        Raises: ClusterError with what is in the way, and how to mend it.
        """
        with cluster_lock(self.name):
            context = self._chosen_context()
            self._remember(context)
            kubectl = self._kubectl()
            on_progress(NodeProgress(name="Kubernetes", message=f"looking at the namespace {self._spec.namespace}"))
            live = self._live(kubectl)
            share_token(kubectl, self._spec)
            manifest = self._manifest()
            if live is None:
                on_progress(NodeProgress(name="Kubernetes", message="applying the RayCluster"))
                kubectl.apply(manifest)
            elif _digest_of(live) != _digest_of(manifest):
                on_progress(
                    NodeProgress(name="Kubernetes", message="applying the changed RayCluster; pods that run stay")
                )
                kubectl.apply(with_live_size(manifest, live))
            self._await_head(kubectl, on_progress)
        return self.status()

    def status(self) -> ClusterStatus:
        """Its pods as Kubernetes sees them, and what Ray knows more. Raises: ClusterError if it does not answer."""
        kubectl = self._kubectl()
        clusters, pods = _sorted_out(kubectl.find("rayclusters.ray.io,pods", label=self._label))
        head = next((pod for pod in pods if pod.is_head and pod.state == "alive"), None)
        pods.sort(key=lambda pod: (not pod.is_head, pod.name))
        nodes = [self._node(pod) for pod in pods]
        if not clusters or head is None:
            return ClusterStatus(name=self.name, provider="kubernetes", address=None, nodes=tuple(nodes))
        runs: tuple[str, ...] = ()
        # What is there, and paid for, Kubernetes has said: it is told even where Ray does not answer.
        with contextlib.suppress(ClusterError), kubectl.forward(head.name, DASHBOARD_PORT) as port:
            url, token = f"http://127.0.0.1:{port}", self.token()
            in_ray = {node.name: node for node in ray_nodes(url, token=token, prices={}) if node.state == "alive"}
            nodes = [_with_ray(node, in_ray.get(pod.ip)) for node, pod in zip(nodes, pods, strict=True)]
            runs = tuple(ray_runs(url, token=token))
        address = f"{head.ip}:{RAY_PORT}"
        return ClusterStatus(name=self.name, provider="kubernetes", address=address, nodes=tuple(nodes), runs=runs)

    def down(self, *, on_progress: OnProgress) -> list[str]:
        """Delete all of it. Returns: what Kubernetes still has of it. Raises: ClusterError if it does not say."""
        with cluster_lock(self.name):
            kubectl = self._kubectl()
            selected = ("--selector", self._label, "--ignore-not-found", "--wait=false")
            on_progress(NodeProgress(name="Kubernetes", message="deleting the RayCluster"))
            kinds = "pods,services,secrets"
            if kubectl.has_kuberay():  # it may have gone before, and its kinds with it
                kinds = f"{kinds},{_KUBERAY}"
                kubectl.ask("delete", _KUBERAY, *selected)
            kubectl.ask("delete", "services,secrets", *selected)
            # The operator's own pods end when it sees that; ours need not be asked to wait for a change.
            kubectl.ask("delete", "pods", f"--grace-period={_POD_GRACE_S}", *selected)
            left = self._await_nothing(kubectl, kinds, on_progress)
            if not left:
                delete_state(self.name)
            return left

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the head's pod, whose environment has the token. Raises: ClusterError if it is lost."""
        kubectl = self._kubectl()
        head = self._head(kubectl)
        return kubectl.execute(head.name, command, container=HEAD, stdin=stdin, timeout_s=timeout_s)

    @contextlib.contextmanager
    def job_server(self) -> Iterator[str]:
        """Through a port that kubectl forwards to the head's pod. Raises: ClusterError if it cannot."""
        kubectl = self._kubectl()
        with kubectl.forward(self._head(kubectl).name, DASHBOARD_PORT) as port:
            yield f"http://127.0.0.1:{port}"

    def shell(self, machine: str | None) -> list[str]:
        """Raises: ClusterError if there is no such pod."""
        kubectl = self._kubectl()
        if machine is None:
            pod = self._head(kubectl)
        else:
            pods = self._pods(kubectl)
            found = next((one for one in pods if one.name == machine), None)
            if found is None:
                known = ", ".join(one.name for one in pods) or "none"
                raise ClusterError(f"'{self.name}' has no pod {machine}; it has {known}")
            pod = found
        container = HEAD if pod.is_head else WORKER
        return kubectl.command("exec", "--stdin", "--tty", pod.name, "--container", container, "--", "/bin/bash")

    def _manifest(self) -> Manifest:
        return ray_cluster(self._spec, ray_version=version("ray"))

    def _kubectl(self) -> Kubectl:
        """In the context in which the cluster was started, whatever the current one is by now."""
        context = self._spec.context
        if context is None:
            known = read_record(self.name)
            context = known.state.get("context") if known else None
        return Kubectl(namespace=self._spec.namespace, context=context)

    def _chosen_context(self) -> str | None:
        known = read_record(self.name)
        if known is not None and self._spec.context is None and known.state.get("context"):
            return str(known.state["context"])
        context = self._spec.context or current_context()
        if context is None and "KUBERNETES_SERVICE_HOST" not in os.environ:  # a pod needs none
            raise ClusterError(
                "kubectl is in no context, so there is no Kubernetes to start on: kubectl config get-contexts, "
                "then kubectl config use-context NAME, or context: NAME in the cluster's file. Without one: "
                "forge cluster up FILE --dry-run prints the manifests"
            )
        return context

    def _remember(self, context: str | None) -> None:
        spec = self._spec.model_dump(mode="json", exclude_defaults=True)
        write_record(ClusterRecord(name=self.name, provider="kubernetes", spec=spec, state={"context": context}))

    def _live(self, kubectl: Kubectl) -> Mapping[str, Any] | None:
        """The RayCluster that is there. Raises: ClusterError if somebody else has made it, or it is ending."""
        answer = kubectl.ask(
            "get", "rayclusters.ray.io", cluster_name(self._spec), "--ignore-not-found", "--output", "json"
        )
        if not answer.strip():
            return None
        live: dict[str, Any] = json.loads(answer)
        metadata = live["metadata"]
        if metadata.get("labels", {}).get("app.kubernetes.io/managed-by") != "forge":
            raise ClusterError(
                f"in {self._spec.namespace} there is a RayCluster '{metadata['name']}' that forge has not made; "
                "choose another name: in the cluster's file"
            )
        if "deletionTimestamp" in metadata:
            raise ClusterError(
                f"the RayCluster '{metadata['name']}' is being deleted since {metadata['deletionTimestamp']}; wait "
                f"until it is gone: forge cluster down {self.name}"
            )
        return live

    def _await_head(self, kubectl: Kubectl, on_progress: OnProgress) -> None:
        """Raises: ClusterError if the head cannot start, or does not in time."""
        deadline, told = time.monotonic() + self._patience.up_s, dict[str, str]()
        ended: set[str] = set()
        while True:
            clusters, pods = _sorted_out(kubectl.find("rayclusters.ray.io,pods", label=self._label))
            for pod in pods:
                if told.get(pod.name) != pod.stage:
                    told[pod.name] = pod.stage
                    on_progress(NodeProgress(name=pod.name, message=pod.stage, is_failure=bool(pod.problem)))
            heads = [pod for pod in pods if pod.is_head and pod.state != "ending"]
            head = min(heads, key=lambda pod: ("alive", "starting", "gone").index(pod.state), default=None)
            if head is not None and head.state == "gone":
                ended.add(head.name)
            if head is not None and head.problem and (head.state != "gone" or len(ended) >= _MANY_ENDS):
                raise ClusterError(f"the head of '{self.name}' cannot start: {head.problem}. {self._after(head)}")
            if head is not None and head.state == "alive":
                return self._require_token(head)
            status = clusters[0].get("status", {}) if clusters else {}
            if not clusters:
                raise ClusterError(f"the RayCluster '{cluster_name(self._spec)}' was deleted meanwhile")
            if time.monotonic() > deadline:
                raise self._too_late(head, status)
            time.sleep(self._patience.poll_s)

    def _require_token(self, head: Pod) -> None:
        """Raises: ClusterError if Ray runs there without its token: anybody in Kubernetes could use it."""
        if head.environment.get("RAY_AUTH_MODE") != "token":
            raise ClusterError(
                f"the KubeRay operator has started '{self.name}' without Ray's token: it is older than 1.6. Take "
                f"the cluster down at once, {self._down}, and update the operator: docs/kubernetes.md"
            )

    def _too_late(self, head: Pod | None, status: Mapping[str, Any]) -> ClusterError:
        waited = f"the head of '{self.name}' was not ready within {self._patience.up_s:.0f} s"
        if head is not None:
            return ClusterError(f"{waited}: {head.stage}. {self._after(head)}")
        if told := status.get("reason"):
            return ClusterError(f"{waited}: the operator says: {told}. Nothing of it needs to stay: {self._down}")
        return ClusterError(
            f"{waited}: it has no pod, so no KubeRay operator is at work: kubectl get pods --all-namespaces "
            f"--selector app.kubernetes.io/name=kuberay-operator. The RayCluster stays; or {self._down}"
        )

    def _after(self, pod: Pod) -> str:
        look = " ".join(self._kubectl().command("describe", "pod", pod.name))
        return f"Look at it: {look}. What was started stays; or {self._down}"

    @property
    def _down(self) -> str:
        return f"forge cluster down {self.name}"

    def _await_nothing(self, kubectl: Kubectl, kinds: str, on_progress: OnProgress) -> list[str]:
        deadline, num_told = time.monotonic() + self._patience.down_s, -1
        while left := kubectl.find(kinds, label=self._label):
            if time.monotonic() > deadline:
                break
            if len(left) != num_told:
                num_told = len(left)
                on_progress(NodeProgress(name="Kubernetes", message=f"waiting for {num_told} things to be gone"))
            time.sleep(self._patience.poll_s)
        on_progress(NodeProgress(name="Kubernetes", message="deleted" if not left else "not all is gone"))
        return [self._leftover(thing) for thing in left]

    def _leftover(self, thing: Mapping[str, Any]) -> str:
        metadata = thing["metadata"]
        named = f"{thing['kind'].lower()} {metadata['name']} in {self._spec.namespace}"
        since = metadata.get("deletionTimestamp")
        return f"{named}, terminating since {since}" if since else f"{named}, which nobody deletes"

    def _pods(self, kubectl: Kubectl) -> list[Pod]:
        return [pod_of(pod) for pod in kubectl.find("pods", label=self._label)]

    def _head(self, kubectl: Kubectl) -> Pod:
        heads = [pod for pod in self._pods(kubectl) if pod.is_head]
        if not heads:
            raise ClusterError(f"the cluster '{self.name}' is not up; start it: forge cluster up with its file")
        alive = next((pod for pod in heads if pod.state == "alive"), None)
        if alive is None:
            raise ClusterError(f"the head of '{self.name}' does not run: {heads[0].stage}. {self._after(heads[0])}")
        return alive

    def _node(self, pod: Pod) -> ClusterNode:
        is_paid = not pod.is_head and pod.is_placed
        return ClusterNode(
            name=pod.name,
            kind="head" if pod.is_head else "worker",
            state=pod.state,
            machine_type=self._spec.gpu if pod.num_gpus else "",
            num_cpus=0.0 if pod.is_head else pod.num_cpus,  # as Ray counts: the head takes no ranks
            num_gpus=pod.num_gpus,
            usd_per_hour=self._spec.usd_per_hour if is_paid else None,
        )


def _sorted_out(things: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Pod]]:
    clusters = [thing for thing in things if thing["kind"] == "RayCluster"]
    return clusters, [pod_of(thing) for thing in things if thing["kind"] == "Pod"]


def _with_ray(node: ClusterNode, in_ray: ClusterNode | None) -> ClusterNode:
    """A pod with what Ray says of it, if Ray knows it."""
    return node if in_ray is None else replace(node, node_id=in_ray.node_id, free_cpus=in_ray.free_cpus)


def _digest_of(manifest: Mapping[str, Any]) -> str | None:
    found: str | None = manifest["metadata"].get("annotations", {}).get(DIGEST)
    return found
