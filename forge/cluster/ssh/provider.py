"""Existing hosts reached by OpenSSH; the first one is the head.

All hosts are checked and prepared in parallel: forge's wheel and the locked versions of its dependencies are
installed into their own environment, unless the cluster's file names one. Then Ray is started, head first. A host
that fails is reported with the reason, and the others continue if there are enough. Another `up` retries it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
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
    read_token,
    state_folder,
    write_record,
)
from forge.cluster.dashboard import ray_nodes, ray_runs
from forge.cluster.ssh.bootstrap import BootstrappedHost, Package, bootstrap, last_line
from forge.cluster.ssh.parallel import MAX_THREADS, map_hosts
from forge.cluster.ssh.session import SshHost, cancel_all
from forge.cluster.tools import require_tools
from forge.config.cluster import SshSpec
from forge.config.dump import dump_plain
from forge.errors import ClusterError

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0
_REACH_TIMEOUT_S = 2.0
_UP = "forge cluster up with its file"


class SshCluster:
    """The hosts of an ssh cluster file."""

    shares_files = False
    role = None
    gpu = None

    def __init__(self, spec: SshSpec) -> None:
        self._spec = spec
        self._hosts = {host: self._ssh_host(host) for host in spec.machines}
        self._head = self._hosts[spec.machines[0]]
        self._id = ""
        """Random, in the record and on the hosts: only nodes with it are this cluster's. Set by `up` and `down`."""

    @property
    def name(self) -> str:
        return self._spec.name

    def price(self) -> float | None:
        """The price of all hosts together; they cost whether forge uses them or not."""
        price = self._spec.usd_per_hour
        return None if price is None else price * len(self._hosts)

    def to_yaml(self) -> str:
        """Its file with all defaults."""
        return dump_plain(self._spec.model_dump(mode="json", exclude_none=True))

    def token(self) -> str:
        return read_token(self.name)

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Start Ray on every host where it does not run.

        Raises: ClusterError with the reason for every host that failed, if the others are not enough.
        """
        with cluster_lock(self.name):
            require_tools("ssh")
            token = make_token(self.name)
            record = read_record(self.name)
            state = dict(record.state) if record else {}
            self._id = str(state.setdefault("id", secrets.token_hex(8)))
            self._require_same_head(record)
            self._save_state(state)
            installs = state.setdefault("installs", {})
            self._remove_hosts(installs, on_progress=on_progress)
            package = Package.of(self._spec.wheels) if self._spec.python is None else None
            failures: dict[str, str] = {}
            ready = map_hosts(
                list(self._hosts),
                lambda host: self._bootstrap(
                    host, install=installs.get(host), package=package, on_progress=on_progress
                ),
                failures=failures,
                on_progress=on_progress,
            )
            self._require_head(failures)
            self._require_enough(failures, consequence="nothing was started")
            installs |= {host: [one.python, one.folder] for host, one in ready.items()}
            self._save_state(state)  # before anything is started that `down` must find
            state |= self._start_all(ready, token=token, failures=failures, on_progress=on_progress)
            self._save_state(state)
            consequence = f"what was started stays, until forge cluster down {self.name}"
            self._require_enough(failures, consequence=consequence)
        return self.status()

    def status(self) -> ClusterStatus:
        """Its nodes according to the head's Ray."""
        record = read_record(self.name)
        if record is None or "job_port" not in record.state:
            return ClusterStatus(name=self.name, provider="ssh", address=None)
        addresses: dict[str, str] = record.state.get("addresses", {})
        prices = dict.fromkeys(addresses.values(), self._spec.usd_per_hour)
        with self.job_server() as url:
            try:
                nodes = ray_nodes(url, token=self.token(), prices=prices)
                runs = tuple(ray_runs(url, token=self.token()))
            except ClusterError as error:
                raise ClusterError(f"{error}; if Ray has ended on {self._head.host}, {_UP} restarts it") from None
        shown = [node for node in nodes if node.state == "alive"]
        alive = {node.name for node in shown}
        host_at = {address: host for host, address in addresses.items()}
        shown += self._missing([host for host in self._hosts if addresses.get(host) not in alive])
        return ClusterStatus(
            name=self.name,
            provider="ssh",
            address=record.state["address"],
            nodes=tuple(replace(node, name=host_at.get(node.name, node.name)) for node in shown),
            runs=runs,
        )

    def down(self, *, on_progress: OnProgress) -> list[str]:
        """Stop Ray on all hosts. Returns: the processes that still run, and the hosts that were not reached."""
        with cluster_lock(self.name):
            record = read_record(self.name)
            installs = record.state.get("installs", {}) if record else {}
            self._id = str(record.state.get("id", "")) if record else ""
            failures: dict[str, str] = {}
            stopped = map_hosts(
                list(dict.fromkeys([*self._hosts, *installs])),  # hosts that left its file too
                lambda host: self._stop(host, installs=installs, on_progress=on_progress),
                failures=failures,
                on_progress=on_progress,
            )
            left = [f"{host}: {process}" for host, processes in stopped.items() for process in processes]
            left += [f"{host}: {error}; its processes may still run" for host, error in failures.items()]
            if not left:
                delete_state(self.name)
            return left

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command on the head, with the token of its Ray."""
        python, folder = self._state()["installs"][self._head.host]
        first = python if command[0] == "python" else command[0]
        token = f"{folder}/clusters/{self.name}/{self._head.host}/token"
        variables = self._environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        words = ["env", *(f"{name}={value}" for name, value in variables.items()), first, *command[1:]]
        return self._head.run(words, stdin=stdin, timeout_s=timeout_s)

    @contextlib.contextmanager
    def job_server(self) -> Iterator[str]:
        with self._head.forward(int(self._state()["job_port"])) as port:
            yield f"http://127.0.0.1:{port}"

    def forward(self, port: int, *, local: int = 0) -> AbstractContextManager[int]:
        return self._head.forward(port, local=local)

    def shell(self, machine: str | None) -> list[str]:
        """Raises: ClusterError if the cluster has no such host."""
        chosen = self._hosts.get(machine or self._head.host)
        if chosen is None:
            raise ClusterError(f"'{self.name}' has no machine {machine}; it has {', '.join(self._hosts)}")
        return chosen.ssh()

    def _state(self) -> Mapping[str, Any]:
        record = read_record(self.name)
        if record is None or "job_port" not in record.state:
            raise ClusterError(f"the cluster '{self.name}' is not up; start it: {_UP}")
        return record.state

    def _save_state(self, state: Mapping[str, Any]) -> None:
        spec = self._spec.model_dump(mode="json", exclude_defaults=True)
        write_record(ClusterRecord(name=self.name, provider="ssh", spec=spec, state=state))

    def _ssh_host(self, host: str) -> SshHost:
        return SshHost(
            host=host,
            known_hosts=state_folder("clusters") / f"{self.name}.known_hosts",
            user=self._spec.user,
            port=self._spec.port,
            identity_file=self._spec.identity_file,
        )

    def _require_same_head(self, record: ClusterRecord | None) -> None:
        """Raises: ClusterError if the file names another head, because the old head's runs would be lost."""
        if record is not None and "job_port" in record.state:
            before, now = record.spec["machines"][0], self._head.host
            if before != now:
                raise ClusterError(
                    f"the head of '{self.name}' is {before}, but its file now begins with {now}: put {before} "
                    f"first, or forge cluster down {self.name} before"
                )

    def _require_head(self, failures: Mapping[str, str]) -> None:
        if self._head.host in failures:
            raise ClusterError(
                f"the head of '{self.name}' failed, and the cluster cannot work without it; all failures:\n"
                f"{_format_failures(failures)}"
            )

    def _require_enough(self, failures: Mapping[str, str], *, consequence: str) -> None:
        needed = self._spec.min_machines or len(self._hosts)
        num_ready = len(self._hosts) - len(failures)
        if num_ready < needed:
            raise ClusterError(
                f"{num_ready} of at least {needed} machines of '{self.name}' are ready; the others:\n"
                f"{_format_failures(failures)}\nFix them and run {_UP} again, or lower min_machines in it; "
                f"{consequence}"
            )

    def _remove_hosts(self, installs: dict[str, Any], *, on_progress: OnProgress) -> None:
        """Stop hosts that were removed from the file; `down` retries those that cannot be reached."""
        stopped = map_hosts(
            [host for host in installs if host not in self._hosts],
            lambda host: self._stop(host, installs=installs, on_progress=on_progress),
            failures={},
            on_progress=on_progress,
        )
        for host, left in stopped.items():
            if not left:
                del installs[host]

    def _missing(self, hosts: Sequence[str]) -> list[ClusterNode]:
        """Return the hosts without a Ray node: `gone`, or `unreachable` if they do not answer."""

        def look(host: str) -> ClusterNode:
            try:
                self._hosts[host].run(["true"], timeout_s=_REACH_TIMEOUT_S)
            except ClusterError:
                return ClusterNode(name=host, kind="worker", state="unreachable")
            return ClusterNode(name=host, kind="worker", state="gone", usd_per_hour=self._spec.usd_per_hour)

        if not hosts:
            return []
        with ThreadPoolExecutor(max_workers=MAX_THREADS) as pool:
            return list(pool.map(look, hosts))

    def _bootstrap(
        self, host: str, *, install: Sequence[str] | None, package: Package | None, on_progress: OnProgress
    ) -> BootstrappedHost:
        """Prepare a host.

        Args:
            install: Python and folder that an earlier `up` used on the host.
        """
        ready = bootstrap(
            self._hosts[host],
            folder=self._spec.folder,
            python=self._spec.python,
            package=package,
            report=lambda message: on_progress(NodeProgress(name=host, message=message)),
        )
        if install is not None and install[1] != ready.folder:
            raise ClusterError(
                f"the running node uses the folder {install[1]}, the file says {ready.folder} now: forge cluster "
                f"down {self.name} with the file as it was"
            )
        return ready

    def _start_all(
        self,
        ready: Mapping[str, BootstrappedHost],
        *,
        token: str,
        failures: dict[str, str],
        on_progress: OnProgress,
    ) -> dict[str, Any]:
        """Start Ray on all hosts in parallel; workers wait for the head's port.

        Returns: what `status` and `on_head` need later.
        Raises: ClusterError if the head does not start.
        """
        head, late = self._head.host, dict[str, str]()
        request = {"cluster": self.name, "host": head}
        session = self._node_cli(
            head, ready=ready[head], verb="status", request=request, timeout_s=_STOP_TIMEOUT_S
        )["session"]
        session = session or secrets.token_hex(8)

        def start(host: str) -> int:
            try:
                return self._start(host, ready=ready[host], token=token, session=session, on_progress=on_progress)
            except ClusterError:
                if host == head:
                    cancel_all(wait=False)  # the others would wait for it until their timeout
                raise

        job_ports = map_hosts(list(ready), start, failures=late, on_progress=on_progress)
        failures |= {head: late[head]} if head in late else late
        self._require_head(failures)
        addresses = {host: _address_of(host) for host in self._hosts}
        address = f"{head}:{self._spec.ray_port}"
        return {"session": session, "job_port": job_ports[head], "address": address, "addresses": addresses}

    def _start(
        self, host: str, *, ready: BootstrappedHost, token: str, session: str, on_progress: OnProgress
    ) -> int:
        """Start Ray on a host. Returns: the port of the job server on the head, else 0."""
        on_progress(NodeProgress(name=host, message="starting Ray"))
        request = {
            "cluster": self.name,
            "id": self._id,
            "host": host,
            "address": _address_of(host),
            "token": token,
            "port": self._spec.ray_port,
            "head": None if host == self._head.host else f"{_address_of(self._head.host)}:{self._spec.ray_port}",
            "session": session,
            "environment": self._environment(),
        }
        answer = self._node_cli(host, ready=ready, verb="up", request=request, timeout_s=_START_TIMEOUT_S)
        on_progress(NodeProgress(name=host, message="ready (it was up)" if answer["was_up"] else "ready"))
        return int(answer["job_port"])

    def _stop(self, host: str, *, installs: Mapping[str, Any], on_progress: OnProgress) -> list[str]:
        """Stop Ray on a host. Returns: the processes that still run."""
        on_progress(NodeProgress(name=host, message="stopping"))
        if host not in installs:  # nothing was started there
            return []
        python, folder = installs[host]
        answer = self._node_cli(
            host,
            ready=BootstrappedHost(python=python, folder=folder),
            verb="down",
            request={"cluster": self.name, "host": host, "id": self._id},
            timeout_s=_STOP_TIMEOUT_S,
        )
        message = "stopped"
        if answer["is_other"]:
            message = f"runs another cluster named '{self.name}', started from another machine; left as it is"
        on_progress(NodeProgress(name=host, message=message))
        left: list[str] = answer["left"]
        return left

    def _node_cli(
        self, host: str, *, ready: BootstrappedHost, verb: str, request: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """Run `forge.cluster.ssh.node_cli` on a host. Raises: ClusterError with its error."""
        done = self._ssh_host(host).run(
            [ready.python, "-P", "-m", "forge.cluster.ssh.node_cli", verb, ready.folder],
            stdin=json.dumps(request).encode(),
            timeout_s=timeout_s,
            # Otherwise a node could start after `up` has given up and `down` has looked for it.
            kill_on_disconnect=True,
        )
        try:
            answer = json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            raise ClusterError(
                f"forge does not run there: {last_line(done.stderr) or f'it ended with {done.returncode}'}"
            ) from None
        if "error" in answer:
            raise ClusterError(answer["error"])
        result: dict[str, Any] = answer["answer"]
        return result

    def _environment(self) -> dict[str, str]:
        """Return the environment of Ray's processes on the hosts, which runs inherit."""
        spec = self._spec
        variables = {
            "FORGE_CLOUD": ",".join(spec.clouds),
            "FORGE_USD_PER_HOUR": spec.usd_per_hour,
            "FORGE_MAX_USD_PER_HOUR": spec.max_usd_per_hour,
            "FORGE_STORAGE": spec.storage,
        }
        return {name: str(value) for name, value in variables.items() if value not in (None, "")}


def _address_of(host: str) -> str:
    """Return a host's address for the other hosts. Raises: ClusterError if its name cannot be resolved here."""
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that DNS does not allow
        raise ClusterError(f"{host} cannot be resolved on this machine: {error}") from error


def _format_failures(failures: Mapping[str, str]) -> str:
    return "\n".join(f"  {host}: {error}" for host, error in failures.items())
