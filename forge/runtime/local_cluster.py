"""Whether the cluster of this process is the one that `forge cluster up` started on this machine."""

from __future__ import annotations

import ray

from forge.cluster.local.ray_cluster import find_local


def is_local_cluster() -> bool:
    """Whether all nodes of the connected cluster are on this machine, so that its files are theirs too.

    False for a cluster that a driver has started for its run: its processes inherit the driver's environment.
    """
    local = find_local()
    return local is not None and local.address == ray.get_runtime_context().gcs_address
