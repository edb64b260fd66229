"""Read W&B's local file of a run, `run-<id>.wandb`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from forge.runs.trackers.wandb_log import read_log


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the run's history, as `wandb sync` would upload them."""
    rows = []
    for part in read_log(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(part.content)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


def read_groups(path: Path) -> list[str]:
    """Return the groups recorded for the run."""
    groups = []
    for part in read_log(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(part.content)
        if record.WhichOneof("record_type") == "run":
            groups.append(record.run.run_group)
    return groups
