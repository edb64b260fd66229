"""kubectl, as forge runs it: in one context and namespace, with a time limit, and its complaints in plain words.

It is the user's own client with the user's own credentials; forge knows of neither. What is secret reaches it by
its standard input, never by its command line.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from forge.cluster.base import stdin_arguments
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
_Answer = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubectl:
    """One namespace of one Kubernetes cluster."""

    namespace: str
    context: str | None
    """None for kubectl's current one."""

    def command(self, *words: str) -> list[str]:
        """The words of a kubectl command there."""
        where = ["--context", self.context] if self.context else []
        return ["kubectl", *where, "--namespace", self.namespace, *words]

    def run(
        self, *words: str, stdin: bytes | IO[bytes] = b"", timeout_s: float = _TIMEOUT_S
    ) -> subprocess.CompletedProcess[bytes]:
        """Run kubectl; how it went is the caller's to judge.

        Raises: ClusterError if there is none, or it takes too long.
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

    def ask(self, *words: str, stdin: bytes = b"", timeout_s: float = _TIMEOUT_S) -> str:
        """What kubectl answers to a request of the API. Raises: ClusterError with what it complains about."""
        done = self.run(*words, f"--request-timeout={_REQUEST_TIMEOUT_S}s", stdin=stdin, timeout_s=timeout_s)
        if done.returncode != 0:
            raise self.complaint(done.stderr)
        return done.stdout.decode(errors="replace")

    def find(self, kinds: str, *, label: str) -> list[_Answer]:
        """All things of these kinds with a label, terminating ones too. Raises: ClusterError as `ask` does."""
        answer = self.ask("get", kinds, "--selector", label, "--output", "json")
        items: list[_Answer] = json.loads(answer)["items"]
        return items

    def has_kuberay(self) -> bool:
        """Whether the operator's kinds are known there. Raises: ClusterError as `ask` does."""
        return "rayclusters.ray.io" in self.ask("api-resources", "--api-group", "ray.io", "--output", "name")

    def apply(self, manifest: Mapping[str, Any]) -> None:
        """Have Kubernetes hold a thing as it is described.

        By the server, because kubectl itself would leave a copy in an annotation, of secrets too.

        Raises: ClusterError as `ask` does.
        """
        words = ("apply", "--server-side", "--force-conflicts", "--field-manager", "forge", "--filename", "-")
        self.ask(*words, stdin=json.dumps(manifest).encode())

    def execute(
        self, pod: str, command: Sequence[str], *, container: str, stdin: bytes | IO[bytes], timeout_s: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in a pod; how it went is the caller's to judge.

        Raises: ClusterError if kubectl, and not the command, failed.
        """
        words = ("exec", "--stdin", pod, "--container", container, "--", *command)
        done = self.run(*words, stdin=stdin, timeout_s=timeout_s)
        if done.returncode == 0:
            return done
        words_of_command = _COMMAND_FAILED.sub(b"", done.stderr)
        if words_of_command == done.stderr:  # kubectl says so of every command that failed
            raise self.complaint(done.stderr)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, words_of_command)

    @contextlib.contextmanager
    def forward(self, pod: str, port: int) -> Iterator[int]:
        """A port of this machine's loopback that leads to a port of a pod, while it is open.

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
                yield self._forwarded(tunnel)
            finally:
                tunnel.kill()  # it holds nothing that would have to be put away

    def complaint(self, stderr: bytes) -> ClusterError:
        """What kubectl's last words mean, and what to do about it."""
        words = stderr.decode(errors="replace")
        lines = [line.strip() for line in words.splitlines() if line.strip() and "memcache.go" not in line]
        last = printable(lines[-1], limit=600) if lines else "it did not say why"
        for pattern, meaning in _MEANINGS:
            if found := re.search(pattern, words):
                named = {name: text for name, text in found.groupdict().items() if text}
                told = {"namespace": self.namespace, "verb": "create", "kind": "rayclusters"} | named
                return ClusterError(meaning.format(last=last, by_hand=self._by_hand("get", "pods"), **told))
        return ClusterError(f"kubectl: {last}")

    def _forwarded(self, tunnel: subprocess.Popen[bytes]) -> int:
        assert tunnel.stdout is not None and tunnel.stderr is not None
        deadline, said = time.monotonic() + _FORWARD_TIMEOUT_S, b""
        while not (found := _FORWARDING.search(said)):
            readable, _, _ = select.select([tunnel.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = tunnel.stdout.read1(4096) if readable else b""  # type: ignore[attr-defined]
            if not readable:
                raise ClusterError(f"kubectl did not open a port within {_FORWARD_TIMEOUT_S:.0f} s")
            if not piece:  # it has ended
                raise self.complaint(tunnel.stderr.read())
            said += piece
        return int(found[1])

    def _by_hand(self, *words: str) -> str:
        return shlex.join(self.command(*words))


def current_context() -> str | None:
    """The context that kubectl is in; None if it is in none. Raises: ClusterError if there is no kubectl."""
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
    return ClusterError(
        "there is no kubectl on this machine; install it: https://kubernetes.io/docs/tasks/tools/. "
        "Without it: forge cluster up FILE --dry-run prints the manifests"
    )


_MEANINGS: tuple[tuple[str, str], ...] = (
    (
        r"context was not found|context \"[^\"]*\" does not exist|no context exists|current-context is not set",
        "kubectl does not know the context: {last}; those it knows: kubectl config get-contexts; then set context: "
        "in the cluster's file",
    ),
    (
        r"doesn't have a resource type \"ray|no matches for kind \"Ray|find the requested resource \([a-z]+ ray",
        "the KubeRay operator is not installed in this Kubernetes cluster ({last}); install it: " + _INSTALL,
    ),
    (
        r"strict decoding error|unknown field|field not declared in schema",
        "the KubeRay operator that is installed is older than 1.6 and does not know all fields ({last}); "
        "update it and its CRDs: " + _INSTALL,
    ),
    (
        r"\(Forbidden\)(?:.*?cannot (?P<verb>[a-z]+) resource \"(?P<kind>[a-z]+)\")?",
        "Kubernetes does not allow it: {last}; ask whoever runs it for the right to {verb} {kind} there, and test "
        "it: kubectl auth can-i {verb} {kind} --namespace {namespace}",
    ),
    (
        r"Unauthorized|must be logged in|getting credentials",
        "Kubernetes does not know you: {last}; log in again, then: {by_hand}",
    ),
    (
        r"namespaces \"[^\"]*\" not found",
        "there is no namespace {namespace}; make it: kubectl create namespace {namespace}",
    ),
    (
        r"was refused|Unable to connect|dial tcp|no such host|timed out|i/o timeout|deadline exceeded",
        "Kubernetes cannot be reached: {last}; try it by hand: {by_hand}",
    ),
)
