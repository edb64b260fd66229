"""`remote.json`: where a run on another machine's cluster is, in the local folder that mirrors its records.

The file may have been copied from elsewhere, so it names a cluster that this machine has started, never a file or
an address, and says nothing about how the cluster is reached.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from forge.foreign import from_record, parse_object, read_file
from forge.fs import write_atomic

REMOTE = "remote.json"
_MAX_BYTES = 2**16
_CLUSTER = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_JOB = re.compile(r"[A-Za-z0-9._-]{0,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRef:
    """The cluster, folder and Ray job of a run."""

    cluster: str
    """Name of a cluster that was started from this machine."""
    folder: str
    """Of the run, on the cluster's head."""
    job: str
    """Id of its Ray job; empty after the job has ended."""
    events: int
    """Number of events mirrored when the job was submitted; the job prints those that follow."""
    steps: int


def read_remote_ref(folder: Path) -> RemoteRef | None:
    """Read `remote.json` of a run; None for a run on this machine, or if the file is not what forge writes."""
    try:
        ref = from_record(RemoteRef, parse_object(read_file(folder / REMOTE, max_bytes=_MAX_BYTES)))
    except (OSError, ValueError):
        return None
    there = PurePosixPath(ref.folder)
    is_ours = there.is_absolute() and ".." not in there.parts and there.name == folder.absolute().name
    is_plain = _CLUSTER.fullmatch(ref.cluster) and _JOB.fullmatch(ref.job) and ref.folder.isprintable()
    return ref if is_ours and is_plain and ref.events >= 0 and ref.steps >= 0 else None


def write_remote_ref(folder: Path, ref: RemoteRef) -> None:
    """Write `remote.json` of a run."""
    write_atomic(folder / REMOTE, json.dumps(asdict(ref), indent=1) + "\n")
