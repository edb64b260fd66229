"""What a cluster is to those who use it, wherever its machines are: the door with one inhabitant per provider.

A cluster is started, seen and stopped; commands are run on its head; and its job server, which listens on the
head's loopback alone, is reached through a forwarded port. What this machine knows of a cluster is a small file
in the state folder, written before anything is started, so that whatever was started can be found again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from forge.errors import ClusterError


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProgress:
    """News of one machine while a cluster starts, or stops."""

    machine: str
    stage: str
    """What happens there now, in a few words: `checking`, `installing`, `ready`."""
    is_failure: bool = False


OnProgress = Callable[[NodeProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """A machine of a cluster as it is now."""

    name: str
    """Its address, or the cloud's own name for it."""
    kind: str
    """`head` or `worker`."""
    state: str
    """`alive`; else what is known: `starting`, `gone`, `unreachable`."""
    machine_type: str = ""
    node_id: str = ""
    """Ray's."""
    num_cpus: float = 0.0
    free_cpus: float = 0.0
    """As Ray counts them: not taken by anybody."""
    num_gpus: float = 0.0
    usd_per_hour: float | None = None
    """What it costs now; None if that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """A cluster as it is now."""

    name: str
    provider: str
    address: str | None
    """Of Ray's control store; None if the cluster is not up."""
    nodes: tuple[ClusterNode, ...] = ()
    runs: tuple[str, ...] = ()
    """Ids of the runs that are at work on it."""

    @property
    def usd_per_hour(self) -> float | None:
        """What it costs now, as far as that is known; None if nothing is."""
        known = [node.usd_per_hour for node in self.nodes if node.usd_per_hour is not None]
        return sum(known) if known else None


class Cluster(Protocol):
    """The machines of one cluster file."""

    @property
    def name(self) -> str:
        """As its file says."""

    @property
    def shares_files(self) -> bool:
        """Whether its machines have the files of this one, at the same places."""

    @property
    def gpu(self) -> str | None:
        """Name of its workers' GPUs, if its file says so; None: what the head has."""

    def price(self) -> float | None:
        """USD an hour that it may cost at most; None where nothing is rented, or nobody knows."""

    def render(self) -> str:
        """What `up` will have done, as YAML: nothing is started for it."""

    def token(self) -> str:
        """What its Ray wants of whoever connects. Raises: ClusterError if it cannot be read."""

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Start what does not run yet; what runs is left alone, what is broken is mended.

        Raises: ClusterError with what failed, and how to mend it. What was started until then stays, and is
            found by `down`.
        """

    def status(self) -> ClusterStatus:
        """The cluster as it is now. Raises: ClusterError if it does not answer."""

    def down(self, *, on_progress: OnProgress) -> list[str]:
        """Stop everything. Returns: what is left all the same, a line each; asked of the provider, not remembered.

        Raises: ClusterError if that cannot be found out.
        """

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command on the head, with a `python` of forge's there as its first word where it is `python`.

        Args:
            stdin: What it reads; of an open file, from where it stands.

        Raises: ClusterError if the head is not reached.
        """

    def job_server(self) -> AbstractContextManager[str]:
        """The URL of Ray's job server, as reached from this machine as long as the context is open.

        Raises: ClusterError if it is not reached.
        """

    def shell(self, machine: str | None) -> list[str]:
        """The command that opens a shell on a machine; on the head by default."""


def given(stdin: bytes | IO[bytes]) -> dict[str, Any]:
    """How `subprocess.run` is told what a command reads."""
    return {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """What this machine knows of a cluster that it has started, or begun to."""

    name: str
    provider: str
    spec: Mapping[str, Any]
    """Its file, as plain values: `forge cluster down NAME` needs no file."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the provider wants to know again, such as the region that was chosen."""


def read_record(name: str) -> ClusterRecord | None:
    """What is known of a cluster; None if nothing is."""
    try:
        return ClusterRecord(**json.loads(_record_path(name).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def list_records() -> list[ClusterRecord]:
    """All clusters that this machine has started and not stopped, but for its own."""
    found = (read_record(path.stem) for path in sorted(state_folder("clusters").glob("*.json")))
    return [record for record in found if record is not None]


def write_record(record: ClusterRecord) -> None:
    """Remember a cluster; at no moment is there half a record."""
    path = _record_path(record.name)
    draft = path.with_suffix(".draft")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(json.dumps(asdict(record), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def delete_state(name: str) -> None:
    """Forget a cluster, and its token with it."""
    _record_path(name).unlink(missing_ok=True)
    token_path(name).unlink(missing_ok=True)


def token_path(name: str) -> Path:
    """The file of a cluster's token, which Ray wants of whoever connects."""
    return state_folder("clusters") / f"{name}.token"


def make_token(name: str) -> str:
    """The cluster's token; made if there is none, readable by its owner alone."""
    path = token_path(name)
    with contextlib.suppress(FileExistsError), os.fdopen(_create(path), "w") as file:
        file.write(secrets.token_hex(32))
    token = path.read_text().strip()
    if not token:
        path.unlink()
        raise ClusterError(f"the cluster's token {path} was empty, and is removed: start the cluster again")
    return token


def read_token(name: str) -> str:
    """The cluster's token. Raises: ClusterError if it is not here."""
    try:
        return token_path(name).read_text().strip()
    except OSError as error:
        raise ClusterError(
            f"the token of the cluster '{name}' cannot be read: {error.strerror}; only the machine that started a "
            "cluster has it"
        ) from error


@contextlib.contextmanager
def cluster_lock(name: str) -> Iterator[None]:
    """Hold the cluster's lock, so that two `up` do not mix. Raises: ClusterError if another process has it."""
    with (state_folder("clusters") / f"{name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"another forge starts or stops the cluster '{name}' right now; wait until it is done"
            ) from None
        yield


def state_folder(name: str = "") -> Path:
    """Where this machine keeps what it knows of clusters; made, for the user alone, if it is missing.

    Raises: ClusterError if it cannot be.
    """
    home = os.environ.get("FORGE_STATE") or Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "forge"
    folder = Path(home).expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ClusterError(f"the state folder {folder} cannot be written: {error.strerror}") from error
    return folder


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _record_path(name: str) -> Path:
    return state_folder("clusters") / f"{name}.json"
