"""Pods that the KubeRay operator starts: forge applies a RayCluster with kubectl and reads its status.

An unchanged RayCluster is not applied again, so another `up` starts nothing twice; afterwards only the autoscaler
changes the number of workers. Ray's token is in a Secret, of which this machine keeps a copy: everyone who can read
Secrets in that namespace can use the cluster.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
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
    make_token,
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
    secret_name,
    token_secret,
    with_live_size,
)
from forge.cluster.kubernetes.pods import Pod
from forge.cluster.kubernetes.startup import Timeouts, await_head, inspect_hint, list_objects
from forge.config.cluster import KubernetesSpec
from forge.config.dump import dump_plain
from forge.errors import ClusterError
from forge.fs import write_atomic

_KUBERAY = "rayclusters.ray.io"
_POD_GRACE_S = 10
"""The grace period of pods when the cluster is stopped: no run is there any more that would need longer."""


class KubernetesCluster:
    """The RayCluster of a Kubernetes cluster file."""

    shares_files = False
    role = None

    def __init__(self, spec: KubernetesSpec, *, timeouts: Timeouts | None = None) -> None:
        self._spec, self._timeouts = spec, timeouts or Timeouts()
        self._label = f"{CLUSTER_LABEL}={cluster_name(spec)}"

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def gpu(self) -> str | None:
        return None if self._spec.gpu == "none" else self._spec.gpu

    def price(self) -> float | None:
        """The price of all workers at most; the head's is not known."""
        price = self._spec.usd_per_hour
        return None if price is None else price * self._spec.workers.high

    def to_yaml(self) -> str:
        """The manifest that `up` applies, for use with `kubectl` alone.

        The token is not in it: `up` creates its Secret, or the command in the first lines.
        """
        kubectl = Kubectl(namespace=self._spec.namespace, context=self._spec.context)
        create = shlex.join(
            kubectl.command(
                "create", "secret", "generic", secret_name(self._spec), "--from-file=auth_token=/dev/stdin"
            )
        )
        note = (
            "# Ray's token is in a Secret, which `forge cluster up` creates and never prints. By hand:\n"
            f"#   openssl rand -hex 32 | tr -d '\\n' | {create}\n"
        )
        return note + dump_plain(self._manifest())

    def token(self) -> str:
        try:
            return token_path(self.name).read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"the token of '{self.name}' is not on this machine: {error.strerror}; fetch it from the cluster: "
                "forge cluster up with its file"
            ) from error

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Apply the RayCluster if it is new or has changed, and wait until its head is ready.

        Raises: ClusterError with what prevents it and how to fix it.
        """
        with cluster_lock(self.name):
            self._require_same_place()
            context = self._choose_context()
            kubectl = Kubectl(namespace=self._spec.namespace, context=context)
            _show(on_progress, f"reading the namespace {self._spec.namespace}")
            live = self._live(kubectl)
            self._save_state(context)  # before anything is started, and only if the name is not another's
            self._sync_token(kubectl)
            manifest = self._manifest()
            if live is None:
                _show(on_progress, "applying the RayCluster")
                kubectl.apply(manifest)
            elif live["metadata"].get("annotations", {}).get(DIGEST) != manifest["metadata"]["annotations"][DIGEST]:
                _show(on_progress, "applying the changed RayCluster; running pods stay")
                kubectl.apply(with_live_size(manifest, live))
            await_head(kubectl, name=self.name, label=self._label, timeouts=self._timeouts, on_progress=on_progress)
        return self.status()

    def status(self) -> ClusterStatus:
        """Return the pods according to Kubernetes, with Ray's report on them if it answers."""
        kubectl = self._kubectl()
        found = list_objects(kubectl, label=self._label)
        head = next((pod for pod in found.pods if pod.is_head and pod.state == "alive"), None)
        nodes = [self._node(pod) for pod in found.pods]
        if found.cluster is None or head is None:
            return ClusterStatus(name=self.name, provider="kubernetes", address=None, nodes=tuple(nodes))
        runs: tuple[str, ...] = ()
        # What exists, and costs, is known from Kubernetes: it is shown even if Ray does not answer.
        with contextlib.suppress(ClusterError), kubectl.forward(head.name, DASHBOARD_PORT) as port:
            url, token = f"http://127.0.0.1:{port}", self.token()
            in_ray = {node.name: node for node in ray_nodes(url, token=token, prices={}) if node.state == "alive"}
            nodes = [_with_ray(node, in_ray.get(pod.ip)) for node, pod in zip(nodes, found.pods, strict=True)]
            runs = tuple(ray_runs(url, token=token))
        address = f"{head.ip}:{RAY_PORT}"
        return ClusterStatus(name=self.name, provider="kubernetes", address=address, nodes=tuple(nodes), runs=runs)

    def down(self, *, on_progress: OnProgress) -> list[str]:
        with cluster_lock(self.name):
            kubectl = self._kubectl()
            selected = ("--selector", self._label, "--ignore-not-found", "--wait=false")
            _show(on_progress, "deleting the RayCluster")
            kinds = "pods,services,secrets"
            if kubectl.has_kuberay():  # it may have been uninstalled before, and its kinds with it
                live = kubectl.get(_KUBERAY, cluster_name(self._spec))
                if live is not None and not _is_forges(live):
                    _show(on_progress, f"the RayCluster '{self.name}' is not forge's and is left as it is")
                    delete_state(self.name)
                    return []
                kinds = f"{kinds},{_KUBERAY}"
                kubectl.request("delete", _KUBERAY, *selected)
            kubectl.request("delete", "services,secrets", *selected)
            # The operator would delete the pods too, but with their full grace period.
            kubectl.request("delete", "pods", f"--grace-period={_POD_GRACE_S}", *selected)
            left = self._await_deletion(kubectl, kinds=kinds, on_progress=on_progress)
            if not left:
                delete_state(self.name)
            return left

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the head's pod, whose environment has the token."""
        kubectl = self._kubectl()
        head = self._head(kubectl)
        return kubectl.execute(head.name, command, container=HEAD, stdin=stdin, timeout_s=timeout_s)

    @contextlib.contextmanager
    def job_server(self) -> Iterator[str]:
        kubectl = self._kubectl()
        with kubectl.forward(self._head(kubectl).name, DASHBOARD_PORT) as port:
            yield f"http://127.0.0.1:{port}"

    def forward(self, port: int, *, local: int = 0) -> AbstractContextManager[int]:
        kubectl = self._kubectl()
        return kubectl.forward(self._head(kubectl).name, port, local=local)

    def shell(self, machine: str | None) -> list[str]:
        """Raises: ClusterError if the cluster has no such pod."""
        kubectl = self._kubectl()
        if machine is None:
            pod = self._head(kubectl)
        else:
            pods = list_objects(kubectl, label=self._label).pods
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
        """Return kubectl for the context in which the cluster was started, not the current one."""
        return Kubectl(namespace=self._spec.namespace, context=self._spec.context or self._recorded_context())

    def _recorded_context(self) -> str | None:
        record = read_record(self.name)
        return record.state.get("context") if record else None

    def _choose_context(self) -> str | None:
        context = self._spec.context or self._recorded_context() or current_context()
        if context is None and "KUBERNETES_SERVICE_HOST" not in os.environ:  # inside a pod none is needed
            raise ClusterError(
                "kubectl has no current context, so forge does not know which Kubernetes to use: kubectl config "
                "get-contexts, then kubectl config use-context NAME, or context: NAME in the cluster's file. "
                "Without one: forge cluster up FILE --dry-run prints the manifests"
            )
        return context

    def _require_same_place(self) -> None:
        """Raises: ClusterError if the cluster runs elsewhere: its token would be sent to another namespace."""
        record = read_record(self.name)
        if record is None:
            return
        before = (record.provider, record.spec.get("namespace", "default"), record.state.get("context"))
        now = ("kubernetes", self._spec.namespace, self._spec.context or record.state.get("context"))
        if before != now:
            raise ClusterError(
                f"the cluster '{self.name}' was started in the namespace {before[1]} of {before[2] or before[0]}, "
                f"and its file now says {now[1]} of {now[2] or now[0]}: forge cluster down {self.name} first, or "
                "choose another name: in the file"
            )

    def _save_state(self, context: str | None) -> None:
        spec = self._spec.model_dump(mode="json", exclude_defaults=True)
        write_record(ClusterRecord(name=self.name, provider="kubernetes", spec=spec, state={"context": context}))

    def _sync_token(self, kubectl: Kubectl) -> None:
        """Copy the token from the Secret to this machine, or create both; the running Ray uses the Secret's token.

        Raises: ClusterError if Kubernetes refuses, or the Secret has no token.
        """
        secret = kubectl.get("secrets", secret_name(self._spec))
        if secret is None:
            kubectl.apply(token_secret(self._spec, token=make_token(self.name)))
            return
        token = ""
        with contextlib.suppress(KeyError, TypeError, ValueError, binascii.Error):
            token = base64.b64decode(secret["data"]["auth_token"], validate=True).decode().strip()
        if not token:
            raise ClusterError(
                f"the Secret {secret_name(self._spec)} has no token; stop the cluster and start it again: forge "
                f"cluster down {self.name}"
            )
        write_atomic(token_path(self.name), token, mode=0o600)

    def _live(self, kubectl: Kubectl) -> Mapping[str, Any] | None:
        """Return the existing RayCluster. Raises: ClusterError if forge did not create it, or it is ending."""
        live = kubectl.get("rayclusters.ray.io", cluster_name(self._spec))
        if live is None:
            return None
        metadata = live["metadata"]
        if not _is_forges(live):
            raise ClusterError(
                f"{self._spec.namespace} already has a RayCluster '{metadata['name']}' that forge did not create; "
                "choose another name: in the cluster's file"
            )
        if "deletionTimestamp" in metadata:
            raise ClusterError(
                f"the RayCluster '{metadata['name']}' has been terminating since {metadata['deletionTimestamp']}; "
                f"wait until it is gone: forge cluster down {self.name}"
            )
        return live

    def _await_deletion(self, kubectl: Kubectl, *, kinds: str, on_progress: OnProgress) -> list[str]:
        """Wait until all objects are deleted. Returns: one line for each that still exists after the timeout."""
        deadline, num_shown = time.monotonic() + self._timeouts.down_s, -1
        while left := kubectl.find(kinds, label=self._label):
            if time.monotonic() > deadline:
                break
            if len(left) != num_shown:
                num_shown = len(left)
                _show(on_progress, f"waiting until {num_shown} objects are deleted")
            time.sleep(self._timeouts.poll_s)
        _show(on_progress, "deleted" if not left else "some objects are left")
        return [self._describe_leftover(one) for one in left]

    def _describe_leftover(self, found: Mapping[str, Any]) -> str:
        metadata = found["metadata"]
        named = f"{found['kind'].lower()} {metadata['name']} in {self._spec.namespace}"
        since = metadata.get("deletionTimestamp")
        return f"{named}, terminating since {since}" if since else f"{named}, not marked for deletion"

    def _head(self, kubectl: Kubectl) -> Pod:
        heads = [pod for pod in list_objects(kubectl, label=self._label).pods if pod.is_head]
        if not heads:
            raise ClusterError(f"the cluster '{self.name}' is not up; start it: forge cluster up with its file")
        alive = next((pod for pod in heads if pod.state == "alive"), None)
        if alive is None:
            hint = inspect_hint(kubectl, name=self.name, pod=heads[0])
            raise ClusterError(f"the head of '{self.name}' does not run: {heads[0].progress}. {hint}")
        return alive

    def _node(self, pod: Pod) -> ClusterNode:
        is_paid = not pod.is_head and pod.is_placed
        return ClusterNode(
            name=pod.name,
            kind="head" if pod.is_head else "worker",
            state=pod.state,
            machine_type=self._spec.gpu if pod.num_gpus else "",
            num_cpus=0.0 if pod.is_head else pod.num_cpus,  # as Ray counts: no workers run on the head
            num_gpus=pod.num_gpus,
            usd_per_hour=self._spec.usd_per_hour if is_paid else None,
        )


def _is_forges(live: Mapping[str, Any]) -> bool:
    labels = live["metadata"].get("labels") or {}
    return bool(labels.get("app.kubernetes.io/managed-by") == "forge")


def _show(on_progress: OnProgress, message: str) -> None:
    on_progress(NodeProgress(name="Kubernetes", message=message))


def _with_ray(node: ClusterNode, in_ray: ClusterNode | None) -> ClusterNode:
    """Add what Ray reports about a pod, if Ray knows it."""
    if in_ray is None:
        return node
    return replace(
        node, node_id=in_ray.node_id, gpu=in_ray.gpu, free_cpus=in_ray.free_cpus, free_gpus=in_ray.free_gpus
    )
