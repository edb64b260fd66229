"""Read W&B's own file of a run, `run-<id>.wandb`, which is complete only if W&B was closed.

The file is a log of blocks of 32 KiB, like LevelDB's, with one protocol buffer a record. W&B writes whole blocks
while it runs, so after a kill the last rows are missing, the last record is often incomplete, and a young file has
no record at all. `wandb sync` stops at such a file and uploads none of the run's later ones; hence `repair_log`.
"""

from __future__ import annotations

import glob
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.foreign import open_file, parse_json, typed
from forge.process import has_open

_PREAMBLE_BYTES = 7
_BLOCK_BYTES = 32768
_HEADER = struct.Struct("<IHB")
"""Checksum, length and kind of a part of a record. Source: LevelDB documentation, "log_format"."""
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_MAX_RECORD_BYTES = 16 * 2**20
"""A record has the metrics of one step, or the job file."""
_STEP_KEY = "step"
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRecord:
    """One record of the file."""

    content: bytes
    end: int
    """Its end in the file, in bytes."""

    def message(self) -> Any:
        """Return it as W&B's protocol buffer `Record`."""
        from wandb.proto import wandb_internal_pb2

        return wandb_internal_pb2.Record.FromString(self.content)


def log_files(folder: Path, *, run_id: str) -> list[Path]:
    """Return the files that W&B wrote for a run, online and offline, in the order in which they were started."""
    found = folder.glob(f"wandb/*run-*/run-{glob.escape(run_id)}.wandb")
    own = [path for path in found if not path.is_symlink() and not path.parent.is_symlink() and path.is_file()]
    return sorted(own, key=lambda path: path.parent.name.removeprefix("offline-"))


def is_offline(path: Path) -> bool:
    """Whether a file was written without a server, so that its rows are uploaded by `wandb sync` only."""
    return path.parent.name.startswith("offline-")


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all complete rows of a file."""
    for record in read_log(path):
        items = record.message().history.item
        if items:
            yield {item.key or ".".join(item.nested_key): parse_json(item.value_json) for item in items}


def steps_in(path: Path) -> Iterator[int]:
    """Yield the steps of all complete rows of a file."""
    for row in rows_in(path):
        if _STEP_KEY in row:
            yield typed(int, row[_STEP_KEY])


def repair_log(path: Path) -> str | None:
    """Make a file that is no longer written readable for `wandb sync`.

    An incomplete record at its end is removed; a file without the record of the run, which has no rows either, is
    deleted.

    Returns: what was done; None if nothing had to be.
    """
    has_run, end = False, 0
    for record in read_log(path):
        has_run = has_run or record.message().HasField("run")
        end = record.end
    if not has_run:
        path.unlink()
        return f"deleted {path.name}, in which W&B had written no row"
    num_bytes = path.stat().st_size - end
    if not num_bytes:
        return None
    os.truncate(path, end)
    return f"removed {num_bytes} bytes of an incomplete row from {path.name}"


def wait_until_closed(path: Path, *, timeout_s: float) -> bool:
    """Wait for the process of W&B that writes a file, which outlives a killed recorder by an instant.

    Returns: whether no other process of this user on this machine has it open.
    """
    deadline = time.monotonic() + timeout_s
    while any(has_open(pid, path) for pid in _other_processes()):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def read_log(path: Path) -> Iterator[LogRecord]:
    """Yield the complete records of a file.

    Raises: OSError if it cannot be read; ValueError if a record is larger than any that W&B writes for forge.
    """
    parts = bytearray()
    with os.fdopen(open_file(path), "rb") as file:
        file.seek(_PREAMBLE_BYTES)
        while True:
            left = _BLOCK_BYTES - file.tell() % _BLOCK_BYTES
            if left < _HEADER.size:
                file.seek(left, os.SEEK_CUR)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return
            _, size, kind = _HEADER.unpack(header)
            part = file.read(size)
            if len(part) < size or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
                return
            if kind in (_FULL, _FIRST):
                parts.clear()
            parts += part
            if len(parts) > _MAX_RECORD_BYTES:
                raise ValueError(f"{path.name} has a record of more than {_MAX_RECORD_BYTES} bytes")
            if kind in (_FULL, _LAST):
                yield LogRecord(content=bytes(parts), end=file.tell())


def _other_processes() -> list[int]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid != os.getpid()]
