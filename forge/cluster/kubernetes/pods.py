"""Read from a pod's status whether it runs; if not, what it waits for, and whether it can still start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.errors import printable

_PERMANENT_ERRORS: Mapping[str, str] = {
    "ImagePullBackOff": "its image cannot be pulled; is image: right, and may these nodes pull it?",
    "ErrImageNeverPull": "its image is not on the node; is image: right?",
    "InvalidImageName": "its image name is not valid; correct image: in the cluster's file",
    "CreateContainerConfigError": "its container cannot be created",
    "CreateContainerError": "its container cannot be created",
    "RunContainerError": "its container cannot be started",
    "CrashLoopBackOff": "it exits again and again; read why: kubectl logs --previous",
}
"""Reasons for waiting that do not go away. `ErrImagePull` is not among them: the first pull may fail by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """The current state of one pod of a RayCluster."""

    name: str
    is_head: bool
    state: str
    """`alive`, `starting`, `ending` or `gone`."""
    progress: str
    """What is happening to it, in a few words."""
    problem: str
    """Why it will never run; empty if it may."""
    ip: str
    machine: str
    """The Kubernetes node that it runs on; empty while it is not scheduled."""
    num_cpus: float
    num_gpus: float
    environment: Mapping[str, str]
    """The environment of Ray's container, as far as its manifest has it in plain text."""

    @property
    def is_placed(self) -> bool:
        """Whether it occupies a node, which costs."""
        return bool(self.machine) and self.state != "gone"


def parse_pod(manifest: Mapping[str, Any]) -> Pod:
    """Read a pod's manifest and status."""
    metadata, spec, status = manifest["metadata"], manifest["spec"], manifest.get("status", {})
    container: Mapping[str, Any] = spec["containers"][0]  # Ray's; KubeRay appends its own
    amounts = container.get("resources", {}).get("limits", {})
    state = _state(metadata, status)
    problem = _problem(status) if state in ("starting", "gone") else ""
    return Pod(
        name=metadata["name"],
        is_head=metadata.get("labels", {}).get("ray.io/node-type") == "head",
        state=state,
        progress=problem or _progress(state, status),
        problem=problem,
        ip=status.get("podIP", ""),
        machine=spec.get("nodeName", ""),
        num_cpus=_parse_cpus(str(amounts.get("cpu", "0"))),
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
        if meaning := _PERMANENT_ERRORS.get(waiting.get("reason", "")):
            return _with_reason(meaning, waiting["reason"], waiting.get("message", ""))
    if status.get("phase") in ("Failed", "Succeeded"):
        ended: Mapping[str, Any] = next((one["terminated"] for one in _states(status) if "terminated" in one), {})
        code = ended.get("exitCode")
        how = f"it has ended with exit code {code}" if code is not None else "it has ended"
        return _with_reason(how, status.get("reason") or ended.get("reason", ""), status.get("message", ""))
    return ""


def _progress(state: str, status: Mapping[str, Any]) -> str:
    if state == "alive":
        return "ready"
    if state in ("ending", "gone"):
        return state
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return _with_reason("waiting for a node", scheduled.get("reason", ""), scheduled.get("message", ""))
    for waiting in _waiting(status):
        reason = waiting.get("reason", "")
        if reason == "ErrImagePull":
            return _with_reason("its image could not be pulled, retrying", reason, waiting.get("message", ""))
        return "pulling the image" if reason == "ContainerCreating" else _with_reason("waiting", reason, "")
    return "starting Ray" if status.get("phase") == "Running" else "starting"


def _with_reason(text: str, reason: str, message: str) -> str:
    more = ": ".join(filter(None, [reason, printable(message, limit=300)]))
    return f"{text} ({more})" if more else text


def _waiting(status: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from (one["waiting"] for one in _states(status) if "waiting" in one)


def _states(status: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    containers = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    return [one.get("state", {}) for one in containers]


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((one for one in status.get("conditions", ()) if one.get("type") == kind), {})


def _parse_cpus(quantity: str) -> float:
    """`8` → 8.0; `500m` → 0.5."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
