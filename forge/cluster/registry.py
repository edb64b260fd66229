"""Which clusters there are: from a cluster file, or by the name of one that was started from this machine."""

from __future__ import annotations

from pathlib import Path

from forge.cluster.base import Cluster, list_records, read_record
from forge.cluster.local.provider import NAME, LocalProvider
from forge.config.cluster import SECTIONS, CloudSpec, ClusterSpec, LocalSpec, SshSpec
from forge.config.load import load_cluster
from forge.errors import ArgumentError


def cluster_of(spec: ClusterSpec) -> Cluster:
    """The cluster that a file describes, whether it is up or not."""
    # Imported here, so that a command pays only for the provider that it uses.
    if isinstance(spec, LocalSpec):
        return LocalProvider(spec)
    if isinstance(spec, SshSpec):
        from forge.cluster.ssh.provider import SshCluster

        return SshCluster(spec)
    if isinstance(spec, CloudSpec):
        from forge.cluster.cloud.provider import CloudCluster

        return CloudCluster(spec)
    from forge.cluster.kubernetes.provider import KubernetesCluster

    return KubernetesCluster(spec)


def find_cluster(name: str | None) -> Cluster:
    """A cluster by its name or its file; without either this machine's own.

    Raises: ArgumentError naming what there is instead, JobFileError if the file is wrong.
    """
    if name is None or name == NAME:
        return LocalProvider()
    record = read_record(name)
    if record is not None:
        return cluster_of(SECTIONS[record.provider].model_validate(dict(record.spec), strict=False))
    if Path(name).is_file():
        return cluster_of(load_cluster(name))
    known = ", ".join([NAME, *(other.name for other in list_records())])
    raise ArgumentError(f"no cluster '{name}' was started from here, and there is no such file; there are {known}")
