"""Run kubectl in one context and namespace, with a time limit, and explain its errors.

It is the user's own kubectl with the user's own credentials, which forge never reads. Secrets reach it through
standard input, never on its command line.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import psutil

from forge.cluster.base import stdin_arguments
from forge.cluster.tools import TOOLS
from forge.cluster.tunnel import listens, local_port
from forge.errors import ClusterError, printable

_TIMEOUT_S = 60.0
_REQUEST_TIMEOUT_S = 30
_FORWARD_TIMEOUT_S = 20.0
_FORWARDING = re.compile(rb"Forwarding from 127\.0\.0\.1:(\d+) ->")
_COMMAND_FAILED = re.compile(rb"command terminated with exit code \d+\s*\Z")
_INSTALL = (
    "helm repo add kuberay https://ray-project.github.io/kuberay-helm/ && "
    "helm upgrade --install kuberay-operator kuberay/kuberay-operator --version 1.6.2"
)
_Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubectl:
    """kubectl for one namespace of one Kubernetes cluster."""

    namespace: str
    context: str | None
    """None for kubectl's current context."""

    def command(self, *words: str) -> list[str]:
        """The command line of kubectl with these words."""
        context = ["--context", self.context] if self.context else []
        return ["kubectl", *context, "--namespace", self.namespace, *words]

    def run(
        self, *words: str, stdin: bytes | IO[bytes] = b"", timeout_s: float = _TIMEOUT_S
    ) -> subprocess.CompletedProcess[bytes]:
        """Run kubectl and return its result, whatever its exit code.

        Raises: ClusterError if kubectl is not installed, or takes too long.
        """
        command = self.command(*words)
        try:
            return subprocess.run(
                command, **stdin_arguments(stdin), capture_output=True, timeout=timeout_s, check=False
            )
        except FileNotFoundError:
            raise _no_kubectl() from None
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"Kubernetes did not answer within {timeout_s:.0f} s; try it: {self._by_hand('get', 'pods')}"
            ) from None

    def request(self, *words: str, stdin: bytes = b"", timeout_s: float = _TIMEOUT_S) -> str:
        """Make a request to Kubernetes' API. Returns: kubectl's output. Raises: ClusterError explaining it."""
        done = self.run(*words, f"--request-timeout={_REQUEST_TIMEOUT_S}s", stdin=stdin, timeout_s=timeout_s)
        if done.returncode != 0:
            raise self.explain(done.stderr)
        return done.stdout.decode(errors="replace")

    def get(self, kind: str, name: str) -> _Object | None:
        """One object; None if it does not exist. Raises: ClusterError as `request`."""
        answer = self.request("get", kind, name, "--ignore-not-found", "--output", "json").strip()
        return json.loads(answer) if answer else None

    def find(self, kinds: str, *, label: str) -> list[_Object]:
        """All objects of these kinds with a label, terminating ones too. Raises: ClusterError as `request`."""
        answer = self.request("get", kinds, "--selector", label, "--output", "json")
        items: list[_Object] = json.loads(answer)["items"]
        return items

    def has_kuberay(self) -> bool:
        """Whether KubeRay's kinds are installed. Raises: ClusterError as `request`."""
        return "rayclusters.ray.io" in self.request("api-resources", "--api-group", "ray.io", "--output", "name")

    def apply(self, manifest: Mapping[str, Any]) -> None:
        """Create or change an object; on the server, because kubectl would keep a copy, of secrets too, in it.

        Raises: ClusterError as `request`.
        """
        words = ("apply", "--server-side", "--force-conflicts", "--field-manager", "forge", "--filename", "-")
        self.request(*words, stdin=json.dumps(manifest).encode())

    def execute(
        self, pod: str, command: Sequence[str], *, container: str, stdin: bytes | IO[bytes], timeout_s: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in a pod and return its result, whatever its exit code.

        Raises: ClusterError if kubectl, rather than the command, failed.
        """
        words = ("exec", "--stdin", pod, "--container", container, "--", *command)
        done = self.run(*words, stdin=stdin, timeout_s=timeout_s)
        if done.returncode == 0:
            return done
        stderr = _COMMAND_FAILED.sub(b"", done.stderr)
        if stderr == done.stderr:  # kubectl appends that line whenever the command failed
            raise self.explain(done.stderr)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, stderr)

    @contextlib.contextmanager
    def forward(self, pod: str, port: int, *, local: int = 0) -> Iterator[int]:
        """Forward a port of this machine's loopback to a port of a pod; yields the local port.

        kubectl listens on a port of its own choice. If it ends, another process may take that port, so each
        connection is made by way of `forge.cluster.tunnel.local_port` and checked to be kubectl's.

        Raises: ClusterError if kubectl cannot.
        """
        command = self.command("port-forward", "--address", "127.0.0.1", f"pod/{pod}", f":{port}")
        try:
            tunnel = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except FileNotFoundError:
            raise _no_kubectl() from None
        with tunnel:
            try:
                port = self._await_forward(tunnel)
                with local_port(lambda: _connect_to(tunnel, port), port=local) as listening:
                    yield listening
            finally:
                tunnel.kill()  # it has nothing to clean up

    def explain(self, stderr: bytes) -> ClusterError:
        """What kubectl's error means, and what to do about it."""
        text = stderr.decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip() and "memcache.go" not in line]
        last = printable(lines[-1], limit=600) if lines else "no error message"
        for pattern, message in _ERRORS:
            if found := re.search(pattern, text):
                named = {name: value for name, value in found.groupdict().items() if value}
                values = {"namespace": self.namespace, "verb": "create", "kind": "rayclusters"} | named
                return ClusterError(message.format(last=last, by_hand=self._by_hand("get", "pods"), **values))
        return ClusterError(f"kubectl: {last}")

    def _await_forward(self, tunnel: subprocess.Popen[bytes]) -> int:
        assert tunnel.stdout is not None and tunnel.stderr is not None
        deadline, output = time.monotonic() + _FORWARD_TIMEOUT_S, b""
        while not (found := _FORWARDING.search(output)):
            readable, _, _ = select.select([tunnel.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise ClusterError(f"kubectl did not open a port within {_FORWARD_TIMEOUT_S:.0f} s")
            piece = tunnel.stdout.read1(4096)  # type: ignore[attr-defined]
            if not piece:  # it has ended
                raise self.explain(tunnel.stderr.read())
            output += piece
        return int(found[1])

    def _by_hand(self, *words: str) -> str:
        return shlex.join(self.command(*words))


def _connect_to(tunnel: subprocess.Popen[bytes], port: int) -> socket.socket:
    """Connect to the port of a running kubectl. Raises: OSError if the port is not its own any more."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=_FORWARD_TIMEOUT_S)
    try:
        # After connecting: kubectl does not bind a port again that it has lost.
        with contextlib.suppress(psutil.Error):
            kubectl = psutil.Process(tunnel.pid)
            if listens([kubectl, *kubectl.children(recursive=True)], port=port):  # kubectl may be a wrapper
                connection.settimeout(None)
                return connection
        raise ConnectionRefusedError(f"kubectl does not listen on port {port} any more")
    except BaseException:
        connection.close()
        raise


def current_context() -> str | None:
    """kubectl's current context; None if none is set. Raises: ClusterError if kubectl is not installed."""
    command = ["kubectl", "config", "current-context"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False, text=True
        )
    except FileNotFoundError:
        raise _no_kubectl() from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"kubectl did not answer within {_TIMEOUT_S:.0f} s") from None
    return done.stdout.strip() or None


def _no_kubectl() -> ClusterError:
    (kubectl,) = TOOLS["kubernetes"]
    return ClusterError(
        f"kubectl is not installed on this machine; install it: {kubectl.remedy()}. "
        "Without it: forge cluster up FILE --dry-run prints the manifests"
    )


_ERRORS: tuple[tuple[str, str], ...] = (
    (
        r"context was not found|context \"[^\"]*\" does not exist|no context exists|current-context is not set",
        "kubectl does not know the context: {last}; list its contexts: kubectl config get-contexts; then set "
        "context: in the cluster's file",
    ),
    (
        r"doesn't have a resource type \"ray|no matches for kind \"Ray|find the requested resource \([a-z]+ ray",
        "the KubeRay operator is not installed in this Kubernetes cluster ({last}); install it: " + _INSTALL,
    ),
    (
        r"strict decoding error|unknown field|field not declared in schema",
        "the installed KubeRay operator is older than 1.6 and does not know all fields ({last}); update it and its "
        "CRDs: " + _INSTALL,
    ),
    (
        r"\(Forbidden\)(?:.*?cannot (?P<verb>[a-z]+) resource \"(?P<kind>[a-z]+)\")?",
        "Kubernetes does not allow it: {last}; ask its administrator for the right to {verb} {kind} there, and "
        "test it: kubectl auth can-i {verb} {kind} --namespace {namespace}",
    ),
    (
        r"Unauthorized|must be logged in|getting credentials",
        "Kubernetes does not accept your credentials: {last}; log in again, then: {by_hand}",
    ),
    (
        r"namespaces \"[^\"]*\" not found",
        "the namespace {namespace} does not exist; create it: kubectl create namespace {namespace}",
    ),
    (
        r"was refused|Unable to connect|dial tcp|no such host|timed out|i/o timeout|deadline exceeded",
        "Kubernetes cannot be reached: {last}; try it by hand: {by_hand}",
    ),
)
