"""Find a cluster by its file, or by its name if it was started from this machine."""

from __future__ import annotations

from pathlib import Path

from forge.cluster.base import Cluster, ClusterRecord, list_records, read_record
from forge.cluster.local.provider import LocalCluster
from forge.cluster.local.ray_cluster import NAME
from forge.config.cluster import SECTIONS, CloudSpec, ClusterSpec, KubernetesSpec, LocalSpec, SshSpec
from forge.config.load import load_cluster
from forge.environment import looked_in
from forge.errors import ArgumentError, ClusterError, printable

_NotLocal = SshSpec | CloudSpec | KubernetesSpec


def cluster_of(spec: ClusterSpec) -> Cluster:
    """The cluster that a file describes, whether it is up or not.

    Raises: ArgumentError if it has the name of this machine's own cluster.
    """
    if isinstance(spec, LocalSpec):
        return LocalCluster(spec)
    spec = _with_absolute_paths(spec)
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


def find_known(name: str) -> Cluster:
    """The cluster with this name that was started from this machine, or is this machine's own; never a file.

    Raises: ArgumentError listing the known clusters.
    """
    if name == NAME:
        return LocalCluster()
    record = read_record(name)
    if record is None:
        raise ArgumentError(
            f"'{printable(name, limit=200)}' is not a cluster that was started from here; known clusters: "
            f"{_known()}"
        )
    return cluster_of(recorded_spec(record))


def cluster_of_file(path: str | Path) -> Cluster:
    """The cluster of a file, unless another cluster of its name was started from here, whose token it would get.

    Raises: ArgumentError, JobFileError.
    """
    spec = load_cluster(path)
    record = read_record(spec.name)
    if record is not None and _head_of(recorded_spec(record), record) != _head_of(spec, record):
        raise ArgumentError(
            f"{printable(str(path), limit=200)} describes another cluster than '{spec.name}', which was started "
            f"from here: its head differs. Use the name, {spec.name}, choose another name: in the file, or stop "
            f"the other first: forge cluster down {spec.name}"
        )
    return cluster_of(spec)


def find_cluster(name: str | None) -> Cluster:
    """The cluster with this name or this file; without either, this machine's own.

    A file is never given the token of another cluster: if a cluster of its name was started from here, the file
    must lead to the same head.

    Raises: ArgumentError listing the known clusters, JobFileError if the file is wrong.
    """
    if name is None or name == NAME:
        return LocalCluster()
    record = read_record(name)
    if record is not None:
        return cluster_of(recorded_spec(record))
    if _is_file(name):
        return cluster_of_file(name)
    raise ArgumentError(
        f"'{printable(name, limit=200)}' is neither a cluster that was started from here nor a "
        f"file{looked_in(name)}; known clusters: {_known()}"
    )


def _known() -> str:
    return ", ".join([NAME, *(other.name for other in list_records())])


def _with_absolute_paths(spec: _NotLocal) -> _NotLocal:
    """Return the file with paths of this machine that mean the same in any folder, as its record is used later."""
    changes = {}
    for key in ("identity_file", "wheels"):
        path = getattr(spec, key, None)
        if path is not None:
            try:
                changes[key] = str(Path(path).expanduser().absolute())
            except (OSError, RuntimeError) as error:  # no home folder, or no current one
                raise ArgumentError(f"{key}: {path} cannot be resolved on this machine: {error}") from None
    return spec.model_copy(update=changes)


def cluster_spec(name: str) -> ClusterSpec:
    """Return the file of a cluster that was started from here, or of a path.

    Raises: JobFileError if the file is wrong; ClusterError if the record is.
    """
    record = read_record(name)
    return recorded_spec(record) if record is not None else load_cluster(name)


def running_spec(name: str) -> ClusterSpec | None:
    """Return the file of a cluster that was started from here, with the region that it is in; None without one.

    Raises: ClusterError if its record is not valid any more.
    """
    record = read_record(name)
    if record is None:
        return None
    spec, region = recorded_spec(record), record.state.get("region")
    return spec.model_copy(update={"regions": (str(region),)}) if isinstance(spec, CloudSpec) and region else spec


def recorded_spec(record: ClusterRecord) -> ClusterSpec:
    """Return the cluster file that a record has. Raises: ClusterError if it is not valid any more."""
    try:
        return SECTIONS[record.provider].model_validate(dict(record.spec), strict=False)
    except (KeyError, TypeError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), limit=300)
        raise ClusterError(f"the record of the cluster '{record.name}' cannot be used: {reason}") from None


def _head_of(spec: ClusterSpec, record: ClusterRecord) -> tuple[object, ...]:
    """Return what decides to which machine the token of the recorded cluster is sent."""
    if isinstance(spec, SshSpec):
        return (spec.provider, spec.machines[0], spec.port)
    if isinstance(spec, KubernetesSpec):
        return (spec.provider, spec.namespace, spec.context or record.state.get("context"))
    return (spec.provider,)  # the record of a rented cluster has its head's address


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a name too long for a file, or with a zero byte
        return False
