"""A fake Kubernetes cluster with KubeRay's operator: a folder and a few functions.

No Kubernetes can run where these tests do. `tests.support.kubectl` is a fake kubectl for it,
`tests.support.kubernetes_api` an API for a real kubectl. Each request first does what the operator would have done
since the last one: a pod is ready after a few requests, and gone after one. It does not schedule, pull images,
validate against a schema (tests/cluster/test_manifests.py does), or limit what a pod may do.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "FORGE_TEST_KUBERNETES"
"""The environment variable with the folder."""
_REQUESTS_UNTIL_READY = 2

Thing = dict[str, Any]


@dataclass(kw_only=True)
class World:
    """The state of the cluster, and its faults."""

    contexts: list[str] = field(default_factory=lambda: ["kind", "other"])
    current: str | None = "kind"
    namespaces: list[str] = field(default_factory=lambda: ["default"])
    is_reachable: bool = True
    is_known: bool = True
    """Whether the user's credentials are accepted."""
    has_kuberay: bool = True
    works: bool = True
    """Whether the operator runs, and not only its CRDs are installed."""
    knows_tokens: bool = True
    """False for an operator older than 1.6."""
    forbidden: list[str] = field(default_factory=list)
    """Verbs and kinds, `create secrets`."""
    head: str = "ready"
    """What happens to it: `ready`, `pending`, `no-image`, `bad-first-pull`, `ends`, `ends-once`."""
    stays: list[str] = field(default_factory=list)
    """Kinds whose objects are never deleted, such as `Pod`."""
    port: int = 0
    """The local port that forwarded ports lead to."""


class Kubernetes:
    """For tests: change the world, and read what was requested."""

    def __init__(self, folder: Path, **world: Any) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        program = folder / "bin" / "kubectl"
        root = Path(__file__).parents[2]
        # Without site packages it starts in a third of the time.
        program.write_text(
            f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
            "from tests.support.kubectl import main\nmain()\n"
        )
        program.chmod(0o755)
        (folder / "things.json").write_text("[]")
        self.change(**world)

    def environment(self) -> dict[str, str]:
        """The environment in which this kubectl is found."""
        return {FOLDER: str(self.folder), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def change(self, **world: Any) -> None:
        """Replace the world; fields that are not given are healthy."""
        (self.folder / "world.json").write_text(json.dumps(asdict(World(**world))))

    def things(self, kind: str) -> list[Thing]:
        return [thing for thing in json.loads((self.folder / "things.json").read_text()) if thing["kind"] == kind]

    def calls(self) -> list[list[str]]:
        """Every command line of kubectl so far, without the program's name."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def put(self, thing: Thing) -> None:
        """Add an object, as another user would."""
        with memory(self.folder) as things:
            things.append(thing)

    def resize(self, replicas: int) -> None:
        """Change the number of workers, as Ray's autoscaler would."""
        with memory(self.folder) as things:
            for thing in things:
                if thing["kind"] == "RayCluster":
                    thing["spec"]["workerGroupSpecs"][0]["replicas"] = replicas


def read_world(folder: Path) -> World:
    return World(**json.loads((folder / "world.json").read_text()))


def meanwhile(things: list[Thing], folder: Path, world: World) -> None:
    """What operator, kubelets and garbage collector do between two requests."""
    for thing in list(things):
        is_over = "deletionTimestamp" in thing["metadata"] and thing["kind"] not in world.stays
        if is_over or (thing["kind"].startswith("Ray") and not world.has_kuberay):
            things.remove(thing)
    clusters = [thing for thing in things if thing["kind"] == "RayCluster"]
    alive = {one["metadata"]["name"] for one in clusters if "deletionTimestamp" not in one["metadata"]}
    for thing in things:
        owner = thing["metadata"].get("owner")
        if owner is not None and owner not in alive:
            thing["metadata"].setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
    if not world.works:
        return
    for cluster in clusters:
        if cluster["metadata"]["name"] in alive:
            _reconcile(cluster, things, folder, world)
    for thing in things:
        if thing["kind"] == "Pod":
            _advance_pod(thing, things, world)


def _reconcile(cluster: Thing, things: list[Thing], folder: Path, world: World) -> None:
    name = cluster["metadata"]["name"]
    pods = [one for one in things if one["kind"] == "Pod" and one["metadata"].get("owner") == name]
    for pod in [pod for pod in pods if pod["status"]["phase"] == "Failed"]:
        things.remove(pod)
        pods.remove(pod)
    heads = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/node-type"] == "head"]
    if not heads:
        template = cluster["spec"]["headGroupSpec"]["template"]
        things.append(_new_pod(folder, world, cluster, "head", template))
    for group in cluster["spec"]["workerGroupSpecs"]:
        for _ in range(group["replicas"] - (len(pods) - len(heads))):
            things.append(_new_pod(folder, world, cluster, "worker", group["template"]))
    service: Thing = {
        "kind": "Service",
        "metadata": {"name": f"{name}-head-svc", "labels": {"ray.io/cluster": name}, "owner": name},
    }
    if not any(name_of(one) == name_of(service) for one in things):
        things.append(service)
    cluster["status"] = {"state": "ready"}


def _new_pod(folder: Path, world: World, cluster: Thing, kind: str, template: Thing) -> Thing:
    name, number = cluster["metadata"]["name"], len(list((folder / "bin").parent.glob("pod-*")))
    (folder / f"pod-{number}").touch()
    spec = json.loads(json.dumps(template["spec"]))
    container = spec["containers"][0]
    options = cluster["spec"].get("authOptions", {})
    if options.get("mode") == "token" and world.knows_tokens:
        reference = {"secretKeyRef": {"name": options["secretName"], "key": "auth_token"}}
        container["env"] += [
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN", "valueFrom": reference},
        ]
    if kind == "head" and cluster["spec"]["enableInTreeAutoscaling"]:
        spec["containers"].append({"name": "autoscaler", "image": container["image"]})
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"{name}-{kind}-{number}",
            "namespace": cluster["metadata"]["namespace"],
            "labels": {"ray.io/cluster": name, "ray.io/node-type": kind},
            "owner": name,
        },
        "spec": spec,
        "status": {"phase": "Pending"},
        "requests": 0,
    }


def _advance_pod(pod: Thing, things: list[Thing], world: World) -> None:
    is_head = pod["metadata"]["labels"]["ray.io/node-type"] == "head"
    outcome = world.head if is_head else "ready"
    requests = pod["requests"] = pod["requests"] + 1
    if outcome == "pending":
        message = "0/3 nodes are available: 3 Insufficient cpu."
        pod["status"] = {
            "phase": "Pending",
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            ],
        }
        return
    pod["spec"]["nodeName"] = "machine-1"
    if outcome == "no-image" or (outcome == "bad-first-pull" and requests == 1):
        reason = "ErrImagePull" if requests == 1 else "ImagePullBackOff"
        message = f'Back-off pulling image "{pod["spec"]["containers"][0]["image"]}": not found'
        pod["status"] = _waiting(reason, message)
    elif outcome == "ends" or (outcome == "ends-once" and pod["metadata"]["name"].endswith("-0")):
        ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
        pod["status"] = {"phase": "Failed", "containerStatuses": [{"name": "ray-head", "state": ended}]}
    elif missing := _missing_secret(pod, things):
        pod["status"] = _waiting("CreateContainerConfigError", f'secret "{missing}" not found')
    elif requests < _REQUESTS_UNTIL_READY:
        pod["status"] = _waiting("ContainerCreating", "")
    else:
        pod["status"] = {
            "phase": "Running",
            "podIP": f"10.0.0.{7 + int(pod['metadata']['name'].rpartition('-')[2])}",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "ray", "state": {"running": {}}}],
        }


def environment_of(container: Thing, things: list[Thing]) -> dict[str, str]:
    found = {}
    for one in container["env"]:
        if "value" in one:
            found[one["name"]] = one["value"]
        else:
            reference = one["valueFrom"]["secretKeyRef"]
            (secret,) = [thing for thing in things if name_of(thing) == ("Secret", reference["name"])]
            found[one["name"]] = base64.b64decode(secret["data"][reference["key"]]).decode()
    return found


def _missing_secret(pod: Thing, things: list[Thing]) -> str:
    references = [
        one["valueFrom"]["secretKeyRef"] for one in pod["spec"]["containers"][0]["env"] if "valueFrom" in one
    ]
    there = {thing["metadata"]["name"] for thing in things if thing["kind"] == "Secret"}
    return next((one["name"] for one in references if one["name"] not in there), "")


def _waiting(reason: str, message: str) -> Thing:
    state = {"waiting": {"reason": reason, "message": message}}
    return {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [{"name": "ray", "state": state}],
    }


def name_of(thing: Thing) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]


@contextlib.contextmanager
def memory(folder: Path) -> Iterator[list[Thing]]:
    """The objects, locked for one process at a time."""
    path = folder / "things.json"
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        things = json.loads(path.read_text())
        yield things
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(things))
        draft.replace(path)
