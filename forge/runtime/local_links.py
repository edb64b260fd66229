"""The links between the GPUs of this machine, and the number of GPUs of each node of a cluster."""

from __future__ import annotations

import contextlib

from forge.cluster.base import ClusterStatus
from forge.cluster.local.provider import LocalCluster
from forge.config.job import JobSpec
from forge.errors import ClusterError
from forge.plan.cluster_links import ClusterLinks, cluster_links
from forge.plan.inputs import HardwareInfo
from forge.runtime.local_gpus import num_local_gpus


def local_links(found: HardwareInfo, job: JobSpec) -> ClusterLinks | None:
    """The links between this machine's GPUs, by the nodes of a cluster on it; None if the job is not for them."""
    if found.device != "cuda" or job.resources.gpu != "auto":
        return None
    with contextlib.suppress(ClusterError):
        status = LocalCluster().status()
        if status.address is not None:
            return cluster_links(None, gpus_of_nodes=gpus_of_nodes(status))
    return cluster_links(None, gpus_of_nodes=(num_local_gpus(),))


def gpus_of_nodes(status: ClusterStatus) -> list[int]:
    """The number of GPUs of each live node that has any."""
    return [int(node.num_gpus) for node in status.nodes if node.state == "alive" and node.num_gpus >= 1]
