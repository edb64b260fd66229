"""The measured peaks in the state folder, one file for each processor, precision and version of torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from forge.foreign import from_record, parse_object, read_file
from forge.fs import make_private, state_home, write_atomic

_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPeak:
    """The measured rate of one CPU core or one GPU."""

    processor: str
    dtype: str
    torch: str
    """Its version, which the rate of a matrix product depends on."""
    flops: float
    measured_on: str
    """Date in UTC."""


def kept_peak(processor: str, *, dtype: str, torch: str) -> MeasuredPeak | None:
    """Return the kept measurement; None if there is none or it is damaged."""
    return _read(_path(processor, dtype=dtype, torch=torch))


def keep_peak(processor: str, *, dtype: str, torch: str, measure: Callable[[], MeasuredPeak]) -> MeasuredPeak:
    """Return the kept measurement, or measure and keep it; one process at a time, so that all have the same.

    Raises: OSError if the folder cannot be written.
    """
    path = _path(processor, dtype=dtype, torch=torch)
    make_private(path.parent)
    with (path.parent / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _read(path)
        if found is None:
            found = measure()
            write_atomic(path, json.dumps(asdict(found), indent=1) + "\n")
        return found


def _path(processor: str, *, dtype: str, torch: str) -> Path:
    key = json.dumps([processor, dtype, torch])
    return state_home() / "peaks" / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.json"


def _read(path: Path) -> MeasuredPeak | None:
    try:
        found: MeasuredPeak = from_record(MeasuredPeak, parse_object(read_file(path, max_bytes=_MAX_FILE_BYTES)))
    except (OSError, ValueError):
        return None
    return found if 0 < found.flops < float("inf") else None
