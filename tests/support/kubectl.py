"""A fake kubectl, for machines without kubectl, and for commands that need a real Kubernetes.

It has the part of kubectl's command line that forge uses, on the objects of `tests.support.kubernetes`, and prints
kubectl's own error messages. `exec` runs a real program on this machine with the pod's environment; `port-forward`
leads to a real port.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

from tests.support.kubernetes import (
    FOLDER,
    Thing,
    World,
    environment_of,
    meanwhile,
    memory,
    name_of,
    read_world,
)

_KINDS = {
    "pods": "Pod",
    "pod": "Pod",
    "services": "Service",
    "secrets": "Secret",
    "rayclusters.ray.io": "RayCluster",
}


def main() -> None:
    folder = Path(os.environ[FOLDER])
    with (folder / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    _Program(folder, read_world(folder)).run(sys.argv[1:])


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
            sys.stdout.write("rayclusters.ray.io\nrayservices.ray.io\n")

    def _get(self, options: argparse.Namespace, _: list[str]) -> None:
        kinds = self._kinds(options.words[0])
        self._require("list" if options.selector else "get", kinds)
        with memory(self._folder) as things:
            meanwhile(things, self._folder, self._world)
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
        if kind == "RayCluster" and not self._world.has_kuberay:
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
        with memory(self._folder) as things:
            old = next((one for one in things if name_of(one) == name_of(thing)), None)
            if old is not None:
                things.remove(old)
                thing = old | thing
            things.append(thing)
        sys.stdout.write(f"{kind.lower()}/{thing['metadata']['name']} serverside-applied\n")

    def _delete(self, options: argparse.Namespace, _: list[str]) -> None:
        kinds = self._kinds(options.words[0])
        self._require("delete", kinds)
        with memory(self._folder) as things:
            for thing in things:
                if thing["kind"] in kinds and _is_selected(thing, options):
                    thing["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                    sys.stdout.write(f'{thing["kind"].lower()} "{thing["metadata"]["name"]}" deleted\n')

    def _exec(self, options: argparse.Namespace, command: list[str]) -> None:
        with memory(self._folder) as things:
            pod = self._pod(things, options.words[0])
            (container,) = [one for one in pod["spec"]["containers"] if one["name"] == options.container]
            environment = environment_of(container, things)
        python = str(Path(sys.executable).parent)
        environment = os.environ | environment | {"PATH": f"{python}:{os.environ['PATH']}"}
        done = subprocess.run(
            command, env=environment, stdin=None if options.stdin else subprocess.DEVNULL, check=False
        )
        if done.returncode:
            sys.stderr.write(f"command terminated with exit code {done.returncode}\n")
            sys.exit(done.returncode)

    def _port_forward(self, options: argparse.Namespace, _: list[str]) -> None:
        with memory(self._folder) as things:
            self._pod(things, options.words[0].removeprefix("pod/"))
        port = int(options.words[1].removeprefix(":"))
        with socket.create_server((options.address, 0)) as server:
            sys.stdout.write(f"Forwarding from {options.address}:{server.getsockname()[1]} -> {port}\n")
            sys.stdout.flush()
            while True:
                near, _address = server.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._world.port))
                except OSError:  # nothing listens in the pod
                    near.close()
                    continue
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

    def _pod(self, things: list[Thing], name: str) -> Thing:
        found = next((one for one in things if name_of(one) == ("Pod", name)), None)
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


def _is_selected(thing: Thing, options: argparse.Namespace) -> bool:
    metadata = thing["metadata"]
    if options.selector:
        key, _, value = options.selector.partition("=")
        return bool(metadata.get("labels", {}).get(key) == value)
    return bool(metadata["name"] == options.words[1])


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


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


def _fail(words: str) -> NoReturn:
    sys.stderr.write(f"{words}\n")
    sys.exit(1)
