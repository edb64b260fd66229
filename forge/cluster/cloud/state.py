"""The local state of a rented cluster: its record, and a folder with the key, launch file and log.

The record's state has `id`, which is also in a tag on everything that the cluster has in the cloud: names can be
chosen twice, ids cannot. It has `tried`, the regions where something may have been rented, in order. If the cluster
is up, it also has `region`, `address`, `private_address` and `python` of the head, and `prices` by node type.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.cluster.base import ClusterRecord, delete_state, state_folder, write_record
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError

CLUSTER_TAG, ID_TAG = "forge-cluster", "forge-cluster-id"
"""Tags, or labels, with the cluster's name and id on everything that forge creates; Ray adds its own."""
OWNER = {"owner": "forge"}
_ID = re.compile(r"[0-9a-f]{16}")
_SHORT_NAME_CHARS, _SHORT_ID_CHARS = 31, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterIdentity:
    """A cluster's name and random id; only what has both is the cluster's own."""

    name: str
    id: str

    @classmethod
    def of(cls, name: str, state: Mapping[str, Any]) -> ClusterIdentity:
        """The identity in a cluster's saved state. Raises: ClusterError if it has none."""
        found = state.get("id")
        if not isinstance(found, str) or not _ID.fullmatch(found):
            raise ClusterError(
                f"the record of the cluster '{name}' has no id, so forge cannot tell its machines from others: "
                f"terminate what has the tag {CLUSTER_TAG}={name} in the cloud's console"
            )
        return cls(name=name, id=found)

    @classmethod
    def create(cls, name: str, state: MutableMapping[str, Any]) -> ClusterIdentity:
        """The same, with a new id if the state has none yet. The state must be saved before the id is used."""
        state.setdefault("id", secrets.token_hex(8))
        return cls.of(name, state)

    @property
    def ray_name(self) -> str:
        """The name by which Ray finds the cluster's machines: unique, and short enough for all clouds."""
        return f"{self.name[:_SHORT_NAME_CHARS].rstrip('-')}-{self.id[:_SHORT_ID_CHARS]}"

    @property
    def tags(self) -> dict[str, str]:
        """The tags by which forge finds what is the cluster's."""
        return {CLUSTER_TAG: self.name, ID_TAG: self.id}

    def owns(self, tags: Mapping[str, str]) -> bool:
        """Whether something with these tags is the cluster's."""
        return all(tags.get(key) == value for key, value in self.tags.items())


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
