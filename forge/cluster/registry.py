"""Find a cluster by its file, or by its name if it was started from this machine."""

from __future__ import annotations

from pathlib import Path

from forge.cluster.base import Cluster, list_records, read_record
from forge.cluster.local.provider import LocalCluster
from forge.cluster.local.ray_cluster import NAME
from forge.config.cluster import SECTIONS, CloudSpec, ClusterSpec, LocalSpec, SshSpec
from forge.config.load import load_cluster
from forge.errors import ArgumentError


def cluster_of(spec: ClusterSpec) -> Cluster:
    """The cluster that a file describes, whether it is up or not.

    Raises: ArgumentError if it has the name of this machine's own cluster.
    """
    if isinstance(spec, LocalSpec):
        return LocalCluster(spec)
    if spec.name == NAME:
        raise ArgumentError(f"name: {NAME} is reserved for the cluster on this machine; choose another name")
    # Imported here, so that a command pays only for the provider that it uses.
    if isinstance(spec, SshSpec):
        from forge.cluster.ssh.provider import SshCluster

        return SshCluster(spec)
    if isinstance(spec, CloudSpec):
        from forge.cluster.cloud.provider import CloudCluster

        return CloudCluster(spec)
    from forge.cluster.kubernetes.provider import KubernetesCluster

    return KubernetesCluster(spec)


def find_cluster(name: str | None) -> Cluster:
    """The cluster with this name or this file; without either, this machine's own.

    Raises: ArgumentError listing the known clusters, JobFileError if the file is wrong.
    """
    if name is None or name == NAME:
        return LocalCluster()
    record = read_record(name)
    if record is not None:
        return cluster_of(SECTIONS[record.provider].model_validate(dict(record.spec), strict=False))
    if Path(name).is_file():
        return cluster_of(load_cluster(name))
    known = ", ".join([NAME, *(other.name for other in list_records())])
    raise ArgumentError(
        f"'{name}' is neither a cluster that was started from here nor a file; known clusters: {known}"
    )
