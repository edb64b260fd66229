"""Machines that are there already, reached by OpenSSH: the first one is the head.

All are looked at and made ready in parallel: forge's wheel and the locked versions of what it needs go into an
environment of their own, unless the cluster's file names one. Then Ray is started, the head first. A machine that
fails is named with the reason, and the others go on if they are enough. Another `up` mends what is missing.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import secrets
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from forge.cluster.ssh.parallel import MOST_AT_ONCE, map_hosts
from forge.cluster.ssh.session import SshHost, cancel_all
from forge.config.cluster import SshSpec
from forge.config.dump import dump_plain
from forge.errors import ClusterError

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0
_KNOCK_TIMEOUT_S = 2.0


class SshCluster:
    """The machines of an ssh cluster's file."""

    def __init__(self, spec: SshSpec) -> None:
        self._spec = spec
        self._machines = {host: self._machine(host) for host in spec.machines}
        self._head = self._machines[spec.machines[0]]

    @property
    def name(self) -> str:
        """As its file says."""
        return self._spec.name

    @property
    def shares_files(self) -> bool:
        """They are other machines."""
        return False

    @property
    def gpu(self) -> None:
        """What the head has."""

    def price(self) -> float | None:
        """Of all machines together; they are paid for whether forge uses them or not."""
        price = self._spec.usd_per_hour
        return None if price is None else price * len(self._machines)

    def to_yaml(self) -> str:
        """Its file, with all defaults."""
        return dump_plain(self._spec.model_dump(mode="json", exclude_none=True))

    def token(self) -> str:
        """Of its Ray. Raises: ClusterError if the cluster was not started from here."""
        return read_token(self.name)

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Start it on every machine where it does not run.

        Raises: ClusterError with every machine that failed and why, if the others are not enough.
        """
        with cluster_lock(self.name):
            token = make_token(self.name)
            known = read_record(self.name)
            facts = dict(known.state) if known else {}
            self._require_same_head(known)
            self._remember(facts)
            places = facts.setdefault("places", {})
            self._part(places, on_progress)
            package = Package.of(self._spec.wheels) if self._spec.python is None else None
            failures: dict[str, str] = {}
            ready = map_hosts(
                list(self._machines),
                lambda host: self._prepare(host, places.get(host), package, on_progress),
                failures,
                on_progress,
            )
            self._require_head(failures)
            self._require_enough(failures, "nothing was started")
            places |= {host: [one.python, one.folder] for host, one in ready.items()}
            self._remember(facts)  # from here on there is something to be stopped
            facts |= self._start_all(ready, token, failures, on_progress)
            self._remember(facts)
            self._require_enough(failures, f"what was started stays, until forge cluster down {self.name}")
        return self.status()

    def status(self) -> ClusterStatus:
        """Its machines, as the head's Ray sees them. Raises: ClusterError if the head does not answer."""
        known = read_record(self.name)
        if known is None or "job_port" not in known.state:
            return ClusterStatus(name=self.name, provider="ssh", address=None)
        addresses: dict[str, str] = known.state.get("addresses", {})
        prices = dict.fromkeys(addresses.values(), self._spec.usd_per_hour)
        with self.job_server() as url:
            try:
                nodes = ray_nodes(url, token=self.token(), prices=prices)
                runs = tuple(ray_runs(url, token=self.token()))
            except ClusterError as error:
                raise ClusterError(
                    f"{error}; where Ray has ended on {self._head.host}, {self._up} mends it"
                ) from None
        alive = {node.name for node in nodes if node.state == "alive"}
        named = {address: host for host, address in addresses.items()}
        shown = [node for node in nodes if node.state == "alive"]
        shown += self._missing([host for host in self._machines if addresses.get(host) not in alive])
        return ClusterStatus(
            name=self.name,
            provider="ssh",
            address=known.state["address"],
            nodes=tuple(replace(node, name=named.get(node.name, node.name)) for node in shown),
            runs=runs,
        )

    def down(self, *, on_progress: OnProgress) -> list[str]:
        """Stop it everywhere. Returns: what still runs, and the machines that could not be asked."""
        with cluster_lock(self.name):
            left: list[str] = []
            known = read_record(self.name)
            facts = known.state if known else {}
            failures: dict[str, str] = {}
            places = facts.get("places", {})  # also of machines that its file no longer names
            hosts = list(dict.fromkeys([*self._machines, *places]))
            ended = map_hosts(hosts, lambda host: self._stop(host, places, on_progress), failures, on_progress)
            for host, processes in ended.items():
                left += [f"{host}: {process}" for process in processes]
            left += [f"{host}: {error}; what runs there goes on" for host, error in failures.items()]
            if not left:
                delete_state(self.name)
            return left

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command on the head, as somebody whom its Ray lets in. Raises: ClusterError if it is lost."""
        facts = self._facts()
        python, folder = facts["places"][self._head.host]
        first = python if command[0] == "python" else command[0]
        token = f"{folder}/clusters/{self.name}/{self._head.host}/token"
        settings = self._environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        words = ["env", *(f"{name}={value}" for name, value in settings.items()), first, *command[1:]]
        return self._head.run(words, stdin=stdin, timeout_s=timeout_s)

    @contextlib.contextmanager
    def job_server(self) -> Iterator[str]:
        """Through a port that ssh forwards to the head's loopback."""
        with self._head.forward(int(self._facts()["job_port"])) as port:
            yield f"http://127.0.0.1:{port}"

    def shell(self, machine: str | None) -> list[str]:
        """Raises: ClusterError if there is no such machine."""
        chosen = self._machines.get(machine or self._head.host)
        if chosen is None:
            raise ClusterError(f"'{self.name}' has no machine {machine}; it has {', '.join(self._machines)}")
        return chosen.ssh()

    @property
    def _up(self) -> str:
        return "forge cluster up with its file"

    def _facts(self) -> Mapping[str, Any]:
        known = read_record(self.name)
        if known is None or "job_port" not in known.state:
            raise ClusterError(f"the cluster '{self.name}' is not up; start it: {self._up}")
        return known.state

    def _remember(self, facts: Mapping[str, Any]) -> None:
        spec = self._spec.model_dump(mode="json", exclude_defaults=True)
        write_record(ClusterRecord(name=self.name, provider="ssh", spec=spec, state=facts))

    def _machine(self, host: str) -> SshHost:
        return SshHost(
            host=host,
            known_hosts=state_folder("clusters") / f"{self.name}.known_hosts",
            user=self._spec.user,
            port=self._spec.port,
            identity_file=self._spec.identity_file,
        )

    def _require_same_head(self, known: ClusterRecord | None) -> None:
        """Another head is another cluster, and what runs on the one before would be lost."""
        if known is not None and "job_port" in known.state:
            before, now = known.spec["machines"][0], self._head.host
            if before != now:
                raise ClusterError(
                    f"the head of '{self.name}' is {before}, and its file now begins with {now}: put {before} "
                    f"first, or forge cluster down {self.name} before"
                )

    def _require_head(self, failures: Mapping[str, str]) -> None:
        if self._head.host in failures:
            raise ClusterError(
                f"the head of '{self.name}', without which there is no cluster, failed; all that failed:\n"
                f"{_listed(failures)}"
            )

    def _require_enough(self, failures: Mapping[str, str], consequence: str) -> None:
        least = self._spec.min_machines or len(self._machines)
        num_ready = len(self._machines) - len(failures)
        if num_ready < least:
            raise ClusterError(
                f"{num_ready} of at least {least} machines of '{self.name}' are ready; the others:\n"
                f"{_listed(failures)}\nMend them and {self._up} again, or lower min_machines in it; {consequence}"
            )

    def _part(self, places: dict[str, Any], on_progress: OnProgress) -> None:
        """Stop machines that the file no longer names; those that cannot be, `down` tries again."""
        gone = [host for host in places if host not in self._machines]
        for host, left in map_hosts(
            gone, lambda host: self._stop(host, places, on_progress), {}, on_progress
        ).items():
            if not left:
                del places[host]

    def _missing(self, hosts: Sequence[str]) -> list[ClusterNode]:
        """Machines without a node, and whether they can be reached at all."""

        def one(host: str) -> ClusterNode:
            try:
                self._machines[host].run(["true"], timeout_s=_KNOCK_TIMEOUT_S)
            except ClusterError:
                return ClusterNode(name=host, kind="worker", state="unreachable")
            return ClusterNode(name=host, kind="worker", state="gone", usd_per_hour=self._spec.usd_per_hour)

        if not hosts:
            return []
        with ThreadPoolExecutor(max_workers=MOST_AT_ONCE) as pool:
            return list(pool.map(one, hosts))

    def _prepare(
        self, host: str, place: Sequence[str] | None, package: Package | None, on_progress: OnProgress
    ) -> BootstrappedHost:
        """
        Args:
            place: Where something of the cluster was started there before.
        """
        ready = bootstrap(
            self._machines[host],
            folder=self._spec.folder,
            python=self._spec.python,
            package=package,
            tell=lambda words: on_progress(NodeProgress(name=host, message=words)),
        )
        if place is not None and place[1] != ready.folder:
            raise ClusterError(
                f"what was started there lies in {place[1]}, and the file names {ready.folder} now: forge cluster "
                f"down {self.name} with the file as it was"
            )
        return ready

    def _start_all(
        self, ready: Mapping[str, BootstrappedHost], token: str, failures: dict[str, str], on_progress: OnProgress
    ) -> dict[str, Any]:
        """Start Ray everywhere at once; the others wait for the head's port.

        Returns: what is to be remembered.
        Raises: ClusterError if the head does not start.
        """
        head, late = self._head.host, dict[str, str]()
        place = {"cluster": self.name, "host": head}
        session = self._station(head, ready[head], "look", place, timeout_s=_STOP_TIMEOUT_S)["session"]
        session = session or secrets.token_hex(8)

        def start(host: str) -> int:
            try:
                return self._start(host, ready[host], token, session, on_progress)
            except ClusterError:
                if host == head:
                    cancel_all()  # which would wait in vain
                raise

        job_ports = map_hosts(list(ready), start, late, on_progress)
        failures |= {head: late[head]} if head in late else late
        self._require_head(failures)
        addresses = {host: _address_of(host) for host in self._machines}
        address = f"{head}:{self._spec.ray_port}"
        return {"session": session, "job_port": job_ports[head], "address": address, "addresses": addresses}

    def _start(self, host: str, ready: BootstrappedHost, token: str, session: str, on_progress: OnProgress) -> int:
        """Start Ray on a machine. Returns: of the head, the port of its job server."""
        on_progress(NodeProgress(name=host, message="starting Ray"))
        address = _address_of(host)
        order = {
            "cluster": self.name,
            "host": host,
            "address": address,
            "token": token,
            "temporary": self._temporary(host),
            "port": self._spec.ray_port,
            "head": None if host == self._head.host else f"{_address_of(self._head.host)}:{self._spec.ray_port}",
            "session": session,
            "environment": self._environment(),
        }
        answer = self._station(host, ready, "up", order, timeout_s=_START_TIMEOUT_S)
        on_progress(NodeProgress(name=host, message="ready (it was up)" if answer["was_up"] else "ready"))
        return int(answer["job_port"])

    def _stop(self, host: str, places: Mapping[str, Any], on_progress: OnProgress) -> list[str]:
        on_progress(NodeProgress(name=host, message="stopping"))
        if host not in places:  # it never came to that
            return []
        python, folder = places[host]
        answer = self._station(
            host,
            BootstrappedHost(python=python, folder=folder),
            "down",
            {"cluster": self.name, "host": host, "temporary": self._temporary(host)},
            timeout_s=_STOP_TIMEOUT_S,
        )
        on_progress(NodeProgress(name=host, message="stopped"))
        left: list[str] = answer["left"]
        return left

    def _station(
        self, host: str, ready: BootstrappedHost, verb: str, order: Mapping[str, Any], *, timeout_s: float
    ) -> dict[str, Any]:
        command = [ready.python, "-P", "-m", "forge.cluster.ssh.node_cli", verb, ready.folder]
        done = self._machine(host).run(
            # What starts late, when nobody waits for it any more, would not be found by `down`.
            command,
            stdin=json.dumps(order).encode(),
            timeout_s=timeout_s,
            ends_with_us=True,
        )
        try:
            answer = json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            raise ClusterError(
                f"forge does not run there: {last_line(done.stderr) or f'it ended with {done.returncode}'}"
            ) from None
        if "error" in answer:
            raise ClusterError(answer["error"])
        found: dict[str, Any] = answer["answer"]
        return found

    def _environment(self) -> dict[str, str]:
        """What Ray's processes there, and so a run's, are to know of the cluster."""
        spec = self._spec
        told = {
            "FORGE_CLOUD": ",".join(spec.clouds),
            "FORGE_USD_PER_HOUR": spec.usd_per_hour,
            "FORGE_MAX_USD_PER_HOUR": spec.max_usd_per_hour,
            "FORGE_STORAGE": spec.storage,
        }
        return {name: str(value) for name, value in told.items() if value not in (None, "")}

    def _temporary(self, host: str) -> str:
        """For Ray's sockets, whose path must be short, and its logs; of this cluster and user alone."""
        owner = f"{self._spec.user or getpass.getuser()}@{host}/{self.name}"
        return f"/tmp/forge-{hashlib.blake2b(owner.encode(), digest_size=5).hexdigest()}"


def _address_of(host: str) -> str:
    """As the machines reach each other. Raises: ClusterError if the name is not known here."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ClusterError(f"{host} has no address that is known here: {error}") from error


def _listed(failures: Mapping[str, str]) -> str:
    return "\n".join(f"  {host}: {error}" for host, error in failures.items())
