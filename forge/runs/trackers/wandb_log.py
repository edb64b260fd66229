"""Read W&B's own file of a run, `run-<id>.wandb`, which is complete only if W&B was closed.

The file is a log of blocks of 32 KiB, like LevelDB's, with one protocol buffer a record. W&B writes whole blocks
while it runs, so after a kill the last rows are missing and the last record is often incomplete. `wandb sync`
uploads nothing that comes after an incomplete record, nor the run's later files; hence `cut_incomplete_record`.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forge.process import has_open

_PREAMBLE_BYTES = 7
_BLOCK_BYTES = 32768
_HEADER = struct.Struct("<IHB")
"""Checksum, length and kind of a part of a record. Source: LevelDB documentation, "log_format"."""
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_STEP_KEY = "step"
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRecord:
    """One record of the file."""

    content: bytes
    end: int
    """Its end in the file, in bytes."""


def log_files(folder: Path, *, run_id: str) -> list[Path]:
    """Return the files that W&B wrote for a run, online and offline, in the order in which they were started."""
    found = [path for path in folder.glob(f"wandb/*run-*/run-{run_id}.wandb") if not path.parent.is_symlink()]
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def is_offline(path: Path) -> bool:
    """Whether a file was written without a server, so that its rows are uploaded by `wandb sync` only."""
    return path.parent.name.startswith("offline-")


def steps_in(path: Path) -> Iterator[int]:
    """Yield the steps of all complete rows of a file."""
    from wandb.proto import wandb_internal_pb2

    for record in read_log(path):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(record.content)
        for item in message.history.item:
            if (item.key or ".".join(item.nested_key)) == _STEP_KEY:
                yield int(json.loads(item.value_json))


def cut_incomplete_record(path: Path) -> int:
    """Remove an incomplete record from the end of a file that is no longer written.

    Returns: the number of bytes removed.
    """
    end = max((record.end for record in read_log(path)), default=0)
    size = path.stat().st_size
    if not end or end == size:
        return 0
    os.truncate(path, end)
    return size - end


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
    """Yield the complete records of a file."""
    content = path.read_bytes()
    position, parts = _PREAMBLE_BYTES, b""
    while True:
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEADER.size:
            position += left
        if position + _HEADER.size > len(content):
            return
        _, size, kind = _HEADER.unpack_from(content, position)
        start = position + _HEADER.size
        position = start + size
        if position > len(content) or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        parts = content[start:position] if kind in (_FULL, _FIRST) else parts + content[start:position]
        if kind in (_FULL, _LAST):
            yield LogRecord(content=parts, end=position)


def _other_processes() -> list[int]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid != os.getpid()]
