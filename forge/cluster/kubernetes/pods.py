"""What Kubernetes tells of a pod, in few words: whether it runs, and if not, whether it ever will."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.errors import printable

_HOPELESS: Mapping[str, str] = {
    "ImagePullBackOff": "its image cannot be pulled; is image: right, and may these machines pull it?",
    "ErrImageNeverPull": "its image is not on the machine; is image: right?",
    "InvalidImageName": "its image has no valid name; mend image: in the cluster's file",
    "CreateContainerConfigError": "its container cannot be made",
    "CreateContainerError": "its container cannot be made",
    "RunContainerError": "its container cannot be run",
    "CrashLoopBackOff": "it ends again and again; read why: kubectl logs --previous",
}
"""What a container waits for in vain. `ErrImagePull` is not among them: the first pull may fail for a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod of a RayCluster as it is now."""

    name: str
    is_head: bool
    state: str
    """`alive`, `starting`, `ending` or `gone`."""
    stage: str
    """What happens there now, in a few words."""
    problem: str
    """Why it will not run; empty if it may."""
    ip: str
    machine: str
    """The Kubernetes node that it is on; empty while it has none."""
    num_cpus: float
    num_gpus: float
    environment: Mapping[str, str]
    """Of Ray's container, what is written there in plain text."""

    @property
    def is_placed(self) -> bool:
        """Whether a machine is taken for it, and paid for."""
        return bool(self.machine) and self.state != "gone"


def pod_of(manifest: Mapping[str, Any]) -> Pod:
    """Read a pod's manifest and status."""
    metadata, spec, status = manifest["metadata"], manifest["spec"], manifest.get("status", {})
    container: Mapping[str, Any] = spec["containers"][0]  # Ray's; KubeRay puts its own behind it
    amounts = container.get("resources", {}).get("limits", {})
    state = _state(metadata, status)
    problem = _problem(status) if state in ("starting", "gone") else ""
    return Pod(
        name=metadata["name"],
        is_head=metadata.get("labels", {}).get("ray.io/node-type") == "head",
        state=state,
        stage=problem or _stage(state, status),
        problem=problem,
        ip=status.get("podIP", ""),
        machine=spec.get("nodeName", ""),
        num_cpus=_cpus(str(amounts.get("cpu", "0"))),
        num_gpus=float(amounts.get("nvidia.com/gpu", 0)),
        environment={one["name"]: one["value"] for one in container.get("env", ()) if "value" in one},
    )


def _state(metadata: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    if "deletionTimestamp" in metadata:
        return "ending"
    phase = status.get("phase", "Pending")
    if phase in ("Succeeded", "Failed"):
        return "gone"
    return "alive" if phase == "Running" and _condition(status, "Ready").get("status") == "True" else "starting"


def _problem(status: Mapping[str, Any]) -> str:
    for waiting in _waiting(status):
        if meaning := _HOPELESS.get(waiting.get("reason", "")):
            return _told(meaning, waiting["reason"], waiting.get("message", ""))
    if status.get("phase") in ("Failed", "Succeeded"):
        ended: Mapping[str, Any] = next((one["terminated"] for one in _states(status) if "terminated" in one), {})
        code = ended.get("exitCode")
        how = f"it has ended with exit code {code}" if code is not None else "it has ended"
        return _told(how, status.get("reason") or ended.get("reason", ""), status.get("message", ""))
    return ""


def _stage(state: str, status: Mapping[str, Any]) -> str:
    if state == "alive":
        return "ready"
    if state in ("ending", "gone"):
        return state
    placed = _condition(status, "PodScheduled")
    if placed.get("status") == "False":
        return _told("waiting for a machine", placed.get("reason", ""), placed.get("message", ""))
    for waiting in _waiting(status):
        reason = waiting.get("reason", "")
        if reason == "ErrImagePull":
            return _told("its image could not be pulled, trying again", reason, waiting.get("message", ""))
        return "pulling the image" if reason == "ContainerCreating" else _told("waiting", reason, "")
    return "starting Ray" if status.get("phase") == "Running" else "starting"


def _told(words: str, reason: str, message: str) -> str:
    more = ": ".join(filter(None, [reason, printable(message, limit=300)]))
    return f"{words} ({more})" if more else words


def _waiting(status: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from (one["waiting"] for one in _states(status) if "waiting" in one)


def _states(status: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    containers = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    return [one.get("state", {}) for one in containers]


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((one for one in status.get("conditions", ()) if one.get("type") == kind), {})


def _cpus(quantity: str) -> float:
    """`8` → 8.0; `500m` → 0.5."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
