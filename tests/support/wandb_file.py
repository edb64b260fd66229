"""Read W&B's local file of a run, `run-<id>.wandb`: a LevelDB log of protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_MAGIC_BYTES = 7
_BLOCK_BYTES = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the run's history, as `wandb sync` would upload them."""
    rows = []
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


def read_groups(path: Path) -> list[str]:
    """Return the groups recorded for the run."""
    groups = []
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "run":
            groups.append(record.run.run_group)
    return groups


def _records(content: bytes) -> Iterator[bytes]:
    position, parts = _MAGIC_BYTES, b""
    while position < len(content):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEADER.size:
            position += left
            continue
        _, size, kind = _HEADER.unpack_from(content, position)
        start = position + _HEADER.size
        position = start + size
        parts = content[start:position] if kind in (_FULL, _FIRST) else parts + content[start:position]
        if kind in (_FULL, _LAST):
            yield parts
