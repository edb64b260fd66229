"""An API server for `tests.support.kubernetes`, with what a real kubectl needs for forge's requests.

Discovery, server-side apply, get, list by label, delete, and `exec` by WebSocket; `port-forward` is SPDY even
within a WebSocket, and is left to the stand-in.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.kubernetes import Kubernetes, Thing, environment_of, meanwhile, memory, read_world

_CORE = {"pods": "Pod", "services": "Service", "secrets": "Secret"}
_RAY = {"rayclusters": "RayCluster"}
_WEBSOCKET = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""Source: RFC 6455, section 1.3."""
_STDIN, _STDOUT, _STDERR, _STATUS, _CLOSE = 0, 1, 2, 3, 255
"""The channels of `v5.channel.k8s.io`, the first byte of every message."""


@contextlib.contextmanager
def serve(kubernetes: Kubernetes) -> Iterator[dict[str, str]]:
    """Serve the API inside a `with` block; yields the environment in which kubectl uses it."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    handler = type("Handler", (_Handler,), {"kubernetes": kubernetes})
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "kind",
            "contexts": [{"name": "kind", "context": {"cluster": "kind", "user": "me"}}],
            "clusters": [{"name": "kind", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "me", "user": {}}],
        }
        (kubernetes.folder / "config.json").write_text(json.dumps(config))
        yield {"KUBECONFIG": str(kubernetes.folder / "config.json"), "HOME": str(kubernetes.folder)}
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    kubernetes: Kubernetes
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match url.path.strip("/").split("/"):
            case ["api", "v1", "namespaces", _, "pods", name, "exec"]:
                self._execute(name, query)
            case ["api", "v1", "namespaces", namespace, kind, *name]:
                self._act("", namespace, kind, name, query, body)
            case ["apis", "ray.io", "v1", "namespaces", namespace, kind, *name] if self._has_kuberay():
                self._act("ray.io", namespace, kind, name, query, body)
            case words:
                self._describe(words)

    def _has_kuberay(self) -> bool:
        return read_world(self.kubernetes.folder).has_kuberay

    def _describe(self, words: list[str]) -> None:
        """Discovery: the kinds of objects and the verbs they support."""
        groups = {"": _CORE} | ({"ray.io": _RAY} if self._has_kuberay() else {})
        match words:
            case ["api"]:
                self._send(200, {"kind": "APIVersions", "versions": ["v1"]})
            case ["apis"]:
                version = {"groupVersion": "ray.io/v1", "version": "v1"}
                named = [
                    {"name": name, "versions": [version], "preferredVersion": version} for name in groups if name
                ]
                self._send(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": named})
            case ["api", "v1"]:
                self._send(200, _resources("v1", _CORE))
            case ["apis", "ray.io", "v1"] if "ray.io" in groups:
                self._send(200, _resources("ray.io/v1", _RAY))
            case ["openapi", "v3"]:
                paths = {_base(name): {"serverRelativeURL": f"/openapi/v3/{_base(name)}?hash=1"} for name in groups}
                self._send(200, {"paths": paths})
            case ["openapi", "v3", *base]:
                (group,) = [name for name in groups if _base(name) == "/".join(base)]
                self._send(200, _openapi(group, groups[group]))
            case _:
                self._refuse(404, "NotFound", "the server could not find the requested resource")

    def _act(
        self, group: str, namespace: str, kind: str, name: list[str], query: dict[str, list[str]], body: bytes
    ) -> None:
        world, folder = read_world(self.kubernetes.folder), self.kubernetes.folder
        verb = {"GET": "get" if name else "list"}.get(self.command, self.command.lower())
        if f"{verb} {kind}" in world.forbidden:
            words = (
                f'User "me" cannot {verb} resource "{kind}" in API group "{group}" in the namespace "{namespace}"'
            )
            return self._refuse(403, "Forbidden", f"{kind} is forbidden: {words}")
        wanted = (_CORE | _RAY)[kind]
        with memory(folder) as things:
            meanwhile(things, folder, world)
            if verb == "list":
                key, _, value = query["labelSelector"][0].partition("=")
                found = [one for one in things if one["metadata"].get("labels", {}).get(key) == value]
                items = [_typed(one, group) for one in found if one["kind"] == wanted]
                answer = {"kind": f"{wanted}List", "apiVersion": _version(group), "metadata": {}, "items": items}
                return self._send(200, answer)
            there = [one for one in things if (one["kind"], one["metadata"]["name"]) == (wanted, name[0])]
            if verb == "patch":
                return self._apply(json.loads(body), there, things, namespace)
            if not there:
                return self._refuse(404, "NotFound", f'{kind} "{name[0]}" not found')
            if verb == "delete":
                there[0]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                there[0]["gracePeriodSeconds"] = json.loads(body or b"{}").get("gracePeriodSeconds")
            return self._send(200, _typed(there[0], group))

    def _apply(self, thing: Thing, there: list[Thing], things: list[Thing], namespace: str) -> None:
        world = read_world(self.kubernetes.folder)
        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
        if namespace not in world.namespaces:
            return self._refuse(404, "NotFound", f'namespaces "{namespace}" not found')
        if thing["kind"] == "RayCluster" and not world.knows_tokens:
            words = ".spec.authOptions.secretName: field not declared in schema"
            return self._refuse(500, "", f"failed to create typed patch object (default/pods; ray.io/v1): {words}")
        thing["metadata"] |= {"namespace": namespace, "uid": "1", "resourceVersion": "1"}
        things[:] = [one for one in things if one not in there]
        things.append((there[0] if there else {}) | thing)
        return self._send(200, thing)

    def _execute(self, name: str, query: dict[str, list[str]]) -> None:
        """Run a program on this machine instead of in the pod, with its streams over a WebSocket."""
        with memory(self.kubernetes.folder) as things:
            (pod,) = [one for one in things if (one["kind"], one["metadata"]["name"]) == ("Pod", name)]
            (container,) = [one for one in pod["spec"]["containers"] if one["name"] == query["container"][0]]
            environment = environment_of(container, things)
        digest = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + _WEBSOCKET).encode()).digest()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(digest).decode())
        self.send_header("Sec-WebSocket-Protocol", "v5.channel.k8s.io")
        self.end_headers()
        self.close_connection = True
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with subprocess.Popen(
            query["command"],
            env=os.environ | environment | {"PATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            lock = threading.Lock()
            outputs = [
                threading.Thread(target=self._tell, args=(process.stdout, _STDOUT, lock)),
                threading.Thread(target=self._tell, args=(process.stderr, _STDERR, lock)),
            ]
            for thread in outputs:
                thread.start()
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()
            for thread in outputs:
                thread.join()
            code = process.wait()
        status: dict[str, Any] = {"metadata": {}, "status": "Success"}
        if code:
            causes = [{"reason": "ExitCode", "message": str(code)}]
            status |= {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}
        self._message(_STATUS, json.dumps(status).encode(), lock)
        with contextlib.suppress(OSError):
            self.wfile.write(b"\x88\x02\x03\xe8")  # closed, normally

    def _tell(self, stream: Any, channel: int, lock: threading.Lock) -> None:
        while piece := stream.read1(30000):
            self._message(channel, piece, lock)

    def _message(self, channel: int, piece: bytes, lock: threading.Lock) -> None:
        payload = bytes([channel]) + piece
        size = struct.pack("!B", len(payload)) if len(payload) < 126 else struct.pack("!BH", 126, len(payload))
        with lock, contextlib.suppress(OSError):
            self.wfile.write(b"\x82" + size + payload)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError, struct.error, ValueError):
            while True:
                kind, size = self.rfile.read(2)
                size &= 0x7F
                if size >= 126:
                    form, length = ("!H", 2) if size == 126 else ("!Q", 8)
                    (size,) = struct.unpack(form, self.rfile.read(length))
                mask, masked = self.rfile.read(4), self.rfile.read(size)
                payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(masked))
                if kind & 0x0F == 0x8 or payload[:2] == bytes([_CLOSE, _STDIN]):
                    process.stdin.close()
                    return
                if kind & 0x0F in (0x0, 0x1, 0x2) and payload[:1] == bytes([_STDIN]):
                    process.stdin.write(payload[1:])
                    process.stdin.flush()

    def _send(self, code: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, code: int, reason: str, message: str) -> None:
        answer = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self._send(code, answer | {"reason": reason, "message": message})


def _version(group: str) -> str:
    return f"{group}/v1" if group else "v1"


def _base(group: str) -> str:
    return f"apis/{group}/v1" if group else "api/v1"


def _typed(thing: Thing, group: str) -> Thing:
    return thing | {"apiVersion": _version(group)}


def _resources(version: str, kinds: dict[str, str]) -> dict[str, Any]:
    verbs = ["get", "list", "create", "delete", "patch"]
    named = [
        {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
        for name, kind in kinds.items()
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": named}


def _openapi(group: str, kinds: dict[str, str]) -> dict[str, Any]:
    """The part of the OpenAPI schema by which kubectl sees that the server validates fields."""
    paths = {
        f"/{_base(group)}/namespaces/{{namespace}}/{name}/{{name}}": {
            "patch": {
                "x-kubernetes-group-version-kind": {"group": group, "version": "v1", "kind": kind},
                "responses": {},
                "parameters": [{"name": "fieldValidation", "in": "query"}],
            }
        }
        for name, kind in kinds.items()
    }
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "1"}, "paths": paths}
