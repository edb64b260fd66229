"""The local state of a rented cluster: its record, and a folder with the key, launch file and log.

The record's state has `tried`, the regions where something may have been rented, in order. If the cluster is up, it
also has `region`, `address`, `private_address` and `python` of the head, and `prices` by node type.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.cluster.base import ClusterRecord, delete_state, state_folder, write_record
from forge.config.cluster import CloudSpec


def cluster_folder(name: str) -> Path:
    """The folder for a cluster's key, launch file and log."""
    return state_folder(f"clusters/{name}.d")


def plain_spec(spec: CloudSpec) -> dict[str, Any]:
    """A cluster file as plain values, as the record has it."""
    return spec.model_dump(mode="json", exclude_unset=True)


def save_state(spec: CloudSpec, state: Mapping[str, Any]) -> None:
    """Write the cluster's record."""
    write_record(ClusterRecord(name=spec.name, provider=spec.provider, spec=plain_spec(spec), state=state))


def delete_cluster(name: str) -> None:
    """Delete the cluster's folder, record and token."""
    shutil.rmtree(cluster_folder(name), ignore_errors=True)
    delete_state(name)
