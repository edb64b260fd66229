"""A stand-in for kubectl, a Kubernetes cluster and KubeRay's operator: one program, and a folder as their memory.

It is here because no Kubernetes can run where these tests do. It speaks the part of kubectl's command line that
forge uses, and complains in kubectl's own words. Whenever it is asked, it first does what the operator would have
done meanwhile: pods come up in a few looks, and end in one. `exec` runs a real program on this machine, with the
environment that the pod would have; `port-forward` leads to a real port. What it does not do: schedule, pull,
validate against a schema (tests/cluster/test_manifests.py does), or limit what a pod may do.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

_FOLDER = "FORGE_TEST_KUBERNETES"
_LOOKS_UNTIL_READY = 2
_KINDS = {
    "pods": "Pod",
    "pod": "Pod",
    "services": "Service",
    "secrets": "Secret",
    "rayclusters.ray.io": "RayCluster",
    "rayjobs.ray.io": "RayJob",
}

Thing = dict[str, Any]


@dataclass(kw_only=True)
class World:
    """How the cluster is, and what is wrong with it."""

    contexts: list[str] = field(default_factory=lambda: ["kind", "other"])
    current: str | None = "kind"
    namespaces: list[str] = field(default_factory=lambda: ["default"])
    is_reachable: bool = True
    is_known: bool = True
    """Whether the user's credentials still count."""
    has_kuberay: bool = True
    works: bool = True
    """Whether the operator is at work, and not only its CRDs there."""
    knows_tokens: bool = True
    """An operator older than 1.6 does not."""
    forbidden: list[str] = field(default_factory=list)
    """Verbs and kinds, `create secrets`."""
    head: str = "ready"
    """What becomes of it: `ready`, `pending`, `no-image`, `bad-first-pull`, `ends`, `ends-once`."""
    stays: list[str] = field(default_factory=list)
    """Kinds of which nothing goes away, `Pod`."""
    port: int = 0
    """Where a forwarded port leads to."""


class Kubernetes:
    """The tests' side: a world to be changed, and what was asked of it."""

    def __init__(self, folder: Path, **world: Any) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        program = folder / "bin" / "kubectl"
        root = Path(__file__).parents[2]
        # Without the environment's packages, it starts in a third of the time.
        program.write_text(
            f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
            "from tests.support.kubectl import main\nmain()\n"
        )
        program.chmod(0o755)
        (folder / "things.json").write_text("[]")
        self.change(**world)

    def environment(self) -> dict[str, str]:
        """What leads to this kubectl."""
        return {_FOLDER: str(self.folder), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def change(self, **world: Any) -> None:
        """Another world from now on; what is not named is as in a healthy one."""
        (self.folder / "world.json").write_text(json.dumps(asdict(World(**world))))

    def things(self, kind: str) -> list[Thing]:
        return [thing for thing in json.loads((self.folder / "things.json").read_text()) if thing["kind"] == kind]

    def calls(self) -> list[list[str]]:
        """Every command line, without the program's name."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def put(self, thing: Thing) -> None:
        """As somebody else would."""
        with _memory(self.folder) as things:
            things.append(thing)

    def resize(self, replicas: int) -> None:
        """As Ray's autoscaler would."""
        with _memory(self.folder) as things:
            for thing in things:
                if thing["kind"] == "RayCluster":
                    thing["spec"]["workerGroupSpecs"][0]["replicas"] = replicas


def main() -> None:
    """What the program does."""
    folder = Path(os.environ[_FOLDER])
    with (folder / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    _Program(folder, World(**json.loads((folder / "world.json").read_text()))).run(sys.argv[1:])


class _Program:
    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world

    def run(self, words: list[str]) -> None:
        command: list[str] = []
        if "--" in words:
            words, command = words[: words.index("--")], words[words.index("--") + 1 :]
        options = _parse(words)
        world = self._world
        if options.verb == "config":
            if world.current is None:
                _fail("error: current-context is not set")
            sys.stdout.write(f"{world.current}\n")
            return
        if options.context is not None and options.context not in world.contexts:
            _fail(f"Error in configuration: context was not found for specified context: {options.context}")
        if not world.is_reachable or (options.context or world.current) is None:
            _fail(
                "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
            )
        if not world.is_known:
            _fail("error: You must be logged in to the server (Unauthorized)")
        getattr(self, "_" + options.verb.replace("-", "_"))(options, command)

    def _api_resources(self, options: argparse.Namespace, _: list[str]) -> None:
        if self._world.has_kuberay:
            sys.stdout.write("rayclusters.ray.io\nrayjobs.ray.io\nrayservices.ray.io\n")

    def _get(self, options: argparse.Namespace, _: list[str]) -> None:
        kinds = self._kinds(options.words[0])
        self._require("list" if options.selector else "get", kinds)
        with _memory(self._folder) as things:
            self._meanwhile(things)
            found = [thing for thing in things if thing["kind"] in kinds and _is_selected(thing, options)]
        if not options.selector:
            if not found and not options.ignore_not_found:
                _fail(f'Error from server (NotFound): {options.words[0]} "{options.words[1]}" not found')
            sys.stdout.write(json.dumps(found[0]) if found else "")
            return
        sys.stdout.write(json.dumps({"apiVersion": "v1", "kind": "List", "items": found}))

    def _apply(self, options: argparse.Namespace, _: list[str]) -> None:
        assert options.filename == "-" and options.server_side
        thing: Thing = json.load(sys.stdin)
        kind = thing["kind"]
        if kind in ("RayCluster", "RayJob") and not self._world.has_kuberay:
            _fail(
                f'error: resource mapping not found for name: "{thing["metadata"]["name"]}" namespace: '
                f'"{options.namespace}" from "STDIN": no matches for kind "{kind}" in version "ray.io/v1"\n'
                "ensure CRDs are installed first"
            )
        if options.namespace not in self._world.namespaces:
            _fail(f'Error from server (NotFound): namespaces "{options.namespace}" not found')
        if kind == "RayCluster" and not self._world.knows_tokens and "secretName" in thing["spec"]["authOptions"]:
            _fail(
                "error: failed to create typed patch object (default/pods; ray.io/v1, Kind=RayCluster): "
                ".spec.authOptions.secretName: field not declared in schema"
            )
        self._require("patch", [kind])
        thing["metadata"]["namespace"] = options.namespace
        with _memory(self._folder) as things:
            old = next((one for one in things if _name(one) == _name(thing)), None)
            if old is not None:
                things.remove(old)
                thing = old | thing
            things.append(thing)
        sys.stdout.write(f"{kind.lower()}/{thing['metadata']['name']} serverside-applied\n")

    def _delete(self, options: argparse.Namespace, _: list[str]) -> None:
        kinds = self._kinds(options.words[0])
        self._require("delete", kinds)
        with _memory(self._folder) as things:
            for thing in things:
                if thing["kind"] in kinds and _is_selected(thing, options):
                    thing["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                    sys.stdout.write(f'{thing["kind"].lower()} "{thing["metadata"]["name"]}" deleted\n')

    def _exec(self, options: argparse.Namespace, command: list[str]) -> None:
        with _memory(self._folder) as things:
            pod = self._pod(things, options.words[0])
            (container,) = [one for one in pod["spec"]["containers"] if one["name"] == options.container]
            environment = _environment(container, things)
        python = str(Path(sys.executable).parent)
        environment = os.environ | environment | {"PATH": f"{python}:{os.environ['PATH']}"}
        done = subprocess.run(
            command, env=environment, stdin=None if options.stdin else subprocess.DEVNULL, check=False
        )
        if done.returncode:
            sys.stderr.write(f"command terminated with exit code {done.returncode}\n")
            sys.exit(done.returncode)

    def _port_forward(self, options: argparse.Namespace, _: list[str]) -> None:
        with _memory(self._folder) as things:
            self._pod(things, options.words[0].removeprefix("pod/"))
        port = int(options.words[1].removeprefix(":"))
        with socket.create_server((options.address, 0)) as server:
            sys.stdout.write(f"Forwarding from {options.address}:{server.getsockname()[1]} -> {port}\n")
            sys.stdout.flush()
            while True:
                near, _address = server.accept()
                far = socket.create_connection(("127.0.0.1", self._world.port))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

    def _pod(self, things: list[Thing], name: str) -> Thing:
        found = next((one for one in things if _name(one) == ("Pod", name)), None)
        if found is None:
            _fail(f'Error from server (NotFound): pods "{name}" not found')
        return found

    def _kinds(self, words: str) -> list[str]:
        for word in words.split(","):
            if "ray" in word and not self._world.has_kuberay:
                _fail(f'error: the server doesn\'t have a resource type "{word.partition(".")[0]}"')
        return [_KINDS[word] for word in words.split(",")]

    def _require(self, verb: str, kinds: list[str]) -> None:
        for kind in kinds:
            resource = f"{kind.lower()}s"
            if f"{verb} {resource}" in self._world.forbidden:
                _fail(
                    f'Error from server (Forbidden): {resource} is forbidden: User "me" cannot {verb} resource '
                    f'"{resource}" in API group "" in the namespace "default"'
                )

    def _meanwhile(self, things: list[Thing]) -> None:
        """What the operator, the kubelets and the garbage collector do between two looks."""
        for thing in list(things):
            is_over = "deletionTimestamp" in thing["metadata"] and thing["kind"] not in self._world.stays
            if is_over or (thing["kind"].startswith("Ray") and not self._world.has_kuberay):
                things.remove(thing)
        clusters = [thing for thing in things if thing["kind"] == "RayCluster"]
        alive = {one["metadata"]["name"] for one in clusters if "deletionTimestamp" not in one["metadata"]}
        for thing in things:
            owner = thing["metadata"].get("owner")
            if owner is not None and owner not in alive:
                thing["metadata"].setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
        if not self._world.works:
            return
        for cluster in clusters:
            if cluster["metadata"]["name"] in alive:
                self._reconcile(cluster, things)
        for thing in things:
            if thing["kind"] == "Pod":
                self._live_on(thing, things)

    def _reconcile(self, cluster: Thing, things: list[Thing]) -> None:
        name = cluster["metadata"]["name"]
        pods = [one for one in things if one["kind"] == "Pod" and one["metadata"].get("owner") == name]
        for pod in [pod for pod in pods if pod["status"]["phase"] == "Failed"]:
            things.remove(pod)
            pods.remove(pod)
        heads = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/node-type"] == "head"]
        if not heads:
            template = cluster["spec"]["headGroupSpec"]["template"]
            things.append(self._new_pod(cluster, "head", template))
        for group in cluster["spec"]["workerGroupSpecs"]:
            for _ in range(group["replicas"] - (len(pods) - len(heads))):
                things.append(self._new_pod(cluster, "worker", group["template"]))
        service: Thing = {
            "kind": "Service",
            "metadata": {"name": f"{name}-head-svc", "labels": {"ray.io/cluster": name}, "owner": name},
        }
        if not any(_name(one) == _name(service) for one in things):
            things.append(service)
        cluster["status"] = {"state": "ready"}

    def _new_pod(self, cluster: Thing, kind: str, template: Thing) -> Thing:
        name, number = cluster["metadata"]["name"], len(list((self._folder / "bin").parent.glob("pod-*")))
        (self._folder / f"pod-{number}").touch()
        spec = json.loads(json.dumps(template["spec"]))
        container = spec["containers"][0]
        options = cluster["spec"].get("authOptions", {})
        if options.get("mode") == "token" and self._world.knows_tokens:
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
                "labels": {"ray.io/cluster": name, "ray.io/node-type": kind},
                "owner": name,
            },
            "spec": spec,
            "status": {"phase": "Pending"},
            "looks": 0,
        }

    def _live_on(self, pod: Thing, things: list[Thing]) -> None:
        is_head = pod["metadata"]["labels"]["ray.io/node-type"] == "head"
        fate = self._world.head if is_head else "ready"
        looks = pod["looks"] = pod["looks"] + 1
        if fate == "pending":
            message = "0/3 nodes are available: 3 Insufficient cpu."
            pod["status"] = {
                "phase": "Pending",
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
                ],
            }
            return
        pod["spec"]["nodeName"] = "machine-1"
        if fate == "no-image" or (fate == "bad-first-pull" and looks == 1):
            reason = "ErrImagePull" if looks == 1 else "ImagePullBackOff"
            message = f'Back-off pulling image "{pod["spec"]["containers"][0]["image"]}": not found'
            pod["status"] = _waiting(reason, message)
        elif fate == "ends" or (fate == "ends-once" and pod["metadata"]["name"].endswith("-0")):
            ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
            pod["status"] = {"phase": "Failed", "containerStatuses": [{"name": "ray-head", "state": ended}]}
        elif missing := _missing_secret(pod, things):
            pod["status"] = _waiting("CreateContainerConfigError", f'secret "{missing}" not found')
        elif looks < _LOOKS_UNTIL_READY:
            pod["status"] = _waiting("ContainerCreating", "")
        else:
            pod["status"] = {
                "phase": "Running",
                "podIP": "10.0.0.7",
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "ray", "state": {"running": {}}}],
            }


def _parse(words: list[str]) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _fail(f"error: {message}")

    parser = Parser(allow_abbrev=False, add_help=False)
    for option in ("context", "selector", "output", "wait", "grace-period", "request-timeout", "field-manager"):
        parser.add_argument(f"--{option}")
    for option in ("filename", "container", "address", "api-group"):
        parser.add_argument(f"--{option}")
    for flag in ("ignore-not-found", "server-side", "force-conflicts", "stdin", "tty"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("verb")
    parser.add_argument("words", nargs="*")
    return parser.parse_intermixed_args(words)


def _is_selected(thing: Thing, options: argparse.Namespace) -> bool:
    metadata = thing["metadata"]
    if options.selector:
        key, _, value = options.selector.partition("=")
        return bool(metadata.get("labels", {}).get(key) == value)
    return bool(metadata["name"] == options.words[1])


def _environment(container: Thing, things: list[Thing]) -> dict[str, str]:
    found = {}
    for one in container["env"]:
        if "value" in one:
            found[one["name"]] = one["value"]
        else:
            reference = one["valueFrom"]["secretKeyRef"]
            (secret,) = [thing for thing in things if _name(thing) == ("Secret", reference["name"])]
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


def _name(thing: Thing) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def _memory(folder: Path) -> Iterator[list[Thing]]:
    """The things that there are, for one process at a time."""
    path = folder / "things.json"
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        things = json.loads(path.read_text())
        yield things
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(things))
        draft.replace(path)


def _fail(words: str) -> NoReturn:
    sys.stderr.write(f"{words}\n")
    sys.exit(1)
