"""The interface that every cluster provider implements, and the record that this machine keeps of each cluster.

A cluster can be started, inspected and stopped; commands run on its head; and its job server, which listens only
on the head's loopback, is reached through a forwarded port. The record of a cluster is a small file in the state
folder. It is written before anything is started, so that everything that was started can be found again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from forge.errors import ClusterError, printable
from forge.fs import make_private, state_home, write_atomic

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
"""As in a cluster file; every file of the state folder is named after a cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProgress:
    """A progress message about one node, region or service while a cluster starts or stops."""

    name: str
    """The node, region or service."""
    message: str
    """What is being done there, in a few words: `checking`, `installing`, `ready`."""
    is_failure: bool = False


OnProgress = Callable[[NodeProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """The current state of one node of a cluster."""

    name: str
    """Its address, or the cloud's own name for it."""
    kind: str
    """`head` or `worker`."""
    state: str
    """`alive`, `starting`, `gone` or `unreachable`."""
    machine_type: str = ""
    node_id: str = ""
    """Ray's node id."""
    num_cpus: float = 0.0
    free_cpus: float = 0.0
    """CPUs that Ray has neither allocated to an actor or task nor reserved in a placement group."""
    num_gpus: float = 0.0
    gpu: str = ""
    """The kind of its GPUs as Ray names it (`accelerator_type`): `A100`; empty if it has none, or it is unknown."""
    free_gpus: float = 0.0
    gone_s: float | None = None
    """Seconds since it left the cluster; None if it is in it, or that is unknown."""
    usd_per_hour: float | None = None
    """Its current price; None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The current state of a cluster."""

    name: str
    provider: str
    address: str | None
    """Address of Ray's control store; None if the cluster is not up."""
    nodes: tuple[ClusterNode, ...] = ()
    runs: tuple[str, ...] = ()
    """Ids of the runs on it."""
    dashboard: str | None = None
    """URL of Ray's dashboard on this machine, which requires the cluster's token; None if it is elsewhere."""

    @property
    def usd_per_hour(self) -> float | None:
        """The sum of the known prices; None if no price is known."""
        known = [node.usd_per_hour for node in self.nodes if node.usd_per_hour is not None]
        return sum(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRole:
    """The rights that a cluster's machines have by themselves, so that they need no keys of the user."""

    scheme: str
    """Of the URLs of the storage that they reach: `s3` or `gs`."""
    prefixes: tuple[str, ...]
    """Beginnings of the environment variables that are not sent to them if they hold a key."""
    storage: str | None = None
    """The only place that they reach; None: whatever their cloud project has."""


class Cluster(Protocol):
    """The cluster that one cluster file describes."""

    @property
    def name(self) -> str:
        """The name in its file."""

    @property
    def shares_files(self) -> bool:
        """Whether its nodes see this machine's files under the same paths."""

    @property
    def gpu(self) -> str | None:
        """The name of its workers' GPUs if its file says so; None: ask the head."""

    @property
    def role(self) -> MachineRole | None:
        """The rights of its machines; None: runs need the user's credentials."""

    def price(self) -> float | None:
        """The most it can cost, in USD per hour; None where nothing is rented or the price is unknown."""

    def to_yaml(self) -> str:
        """What `up` would start, as YAML. Starts nothing."""

    def token(self) -> str:
        """The token that Ray requires from clients. Raises: ClusterError if it cannot be read."""

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Start what does not run yet, repair what is broken, and leave the rest alone.

        Raises: ClusterError with what failed and how to fix it. What was started by then stays, and `down` finds
            it.
        """

    def status(self) -> ClusterStatus:
        """Ask for the current state. Raises: ClusterError if the cluster does not answer."""

    def down(self, *, on_progress: OnProgress) -> list[str]:
        """Stop everything. Returns: what still exists according to the provider, one line each.

        Raises: ClusterError if the provider cannot be asked.
        """

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command on the head. A first word `python` means the Python that has forge there.

        Args:
            stdin: standard input; an open file is read from its current position.

        Raises: ClusterError if the head is not reached.
        """

    def job_server(self) -> AbstractContextManager[str]:
        """Open a tunnel to Ray's job server; yields its URL on this machine.

        Raises: ClusterError if it is not reached.
        """

    def forward(self, port: int, *, local: int = 0) -> AbstractContextManager[int]:
        """Open a tunnel from this machine's loopback to a port of the head's; yields the port on this machine.

        Args:
            local: the port on this machine; 0: a free one.

        Raises: ClusterError if the head is not reached, or the port is taken.
        """

    def shell(self, machine: str | None) -> list[str]:
        """Return the command that opens a shell on a node, on the head if None."""


def stdin_arguments(stdin: bytes | IO[bytes]) -> dict[str, Any]:
    """The keyword arguments by which `subprocess.run` gets this standard input."""
    return {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """What this machine remembers of a cluster that it has started, or begun to start."""

    name: str
    provider: str
    spec: Mapping[str, Any]
    """Its file as plain values, so that `forge cluster down NAME` needs no file."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What the provider needs later, such as the chosen region."""


def read_record(name: str) -> ClusterRecord | None:
    """Read a cluster's record; None if there is none, or it is not a record."""
    if not _NAME.fullmatch(name):
        return None
    try:
        record = ClusterRecord(**json.loads((state_home() / "clusters" / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    is_record = record.name == name and isinstance(record.spec, dict) and isinstance(record.state, dict)
    return record if is_record else None


def list_records() -> list[ClusterRecord]:
    """The records of all clusters that were started from this machine and not stopped, except its own `local`."""
    found = (read_record(path.stem) for path in sorted((state_home() / "clusters").glob("*.json")))
    return [record for record in found if record is not None and record.provider != "local"]


def write_record(record: ClusterRecord) -> None:
    """Save a cluster's record, readable by its owner only."""
    text = json.dumps(asdict(record), indent=1) + "\n"
    write_atomic(_state_file(record.name, "json"), text, mode=0o600)


def delete_state(name: str) -> None:
    """Delete a cluster's record and its token."""
    _state_file(name, "json").unlink(missing_ok=True)
    token_path(name).unlink(missing_ok=True)


def token_path(name: str) -> Path:
    """The file with the token that a cluster's Ray requires from clients."""
    return _state_file(name, "token")


def make_token(name: str) -> str:
    """Return the cluster's token; create it, readable by its owner only, if it does not exist."""
    path = token_path(name)
    with contextlib.suppress(FileExistsError), os.fdopen(_create(path), "w") as file:
        file.write(secrets.token_hex(32))
    token = path.read_text().strip()
    if not token:
        path.unlink()
        raise ClusterError(f"the cluster's token {path} was empty and has been removed; start the cluster again")
    return token


def read_token(name: str) -> str:
    """Return the cluster's token. Raises: ClusterError if this machine does not have it."""
    try:
        return token_path(name).read_text().strip()
    except OSError as error:
        raise ClusterError(
            f"the token of the cluster '{name}' cannot be read: {error.strerror}; only the machine that started a "
            "cluster has its token"
        ) from error


@contextlib.contextmanager
def cluster_lock(name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the cluster's lock, so that two `up` or `down` do not interleave.

    Args:
        wait: wait for a process that holds it, instead of failing.

    Raises: ClusterError if another process holds it.
    """
    with _state_file(name, "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"another forge process is starting or stopping the cluster '{name}'; wait until it is done"
            ) from None
        yield


def state_folder(name: str = "") -> Path:
    """The folder for what this machine remembers of clusters; created, for the user only, if it does not exist.

    Raises: ClusterError if it cannot be created.
    """
    folder = state_home() / name
    try:
        make_private(folder)
    except OSError as error:
        raise ClusterError(
            f"the state folder {folder} cannot be written: {error.strerror}; set HOME or FORGE_STATE "
            "to a folder that this user can write"
        ) from error
    return folder


def _state_file(name: str, kind: str) -> Path:
    """Return a file of a cluster in the state folder. Raises: ClusterError if its name could leave the folder."""
    if not _NAME.fullmatch(name):
        raise ClusterError(
            f"{printable(name, limit=80)} is not a cluster's name: lower-case letters, digits, dashes"
        )
    return state_folder("clusters") / f"{name}.{kind}"


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
