"""Connect a driver process to a Ray cluster, or start one on this machine that ends with the process."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from forge.cluster.local.ray_cluster import require_private_token
from forge.cluster.ray_cli import NO_METRICS
from forge.environment import require_loopback, require_ray_folder
from forge.errors import ClusterError
from forge.limits import usable_cpus
from forge.process import first_line
from forge.runtime.actor_names import NAMESPACE


def prepare_connection(address: str | None) -> None:
    """Check what Ray needs of this machine. Call it before Ray is imported. Raises: ClusterError."""
    require_private_token()
    if address is None:
        require_ray_folder()
        require_loopback()


def connect(address: str | None, *, min_cpus: int) -> None:
    """Connect this process. `ray.init` replaces the handler of SIGTERM.

    Args:
        address: of a cluster that is up; None: start one.
        min_cpus: that a new cluster has at least, whatever this machine has.

    Raises: ClusterError if Ray does not answer or start.
    """
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is not preempted
        os.environ.update(NO_METRICS)
        cpus = max(usable_cpus(), min_cpus)
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 128 * 2**20}
    try:
        # Ray puts this process's current folder on the path of every actor; no module lies in this one.
        with contextlib.chdir("/"):
            ray.init(address or "local", namespace=NAMESPACE, **options)
    except Exception as error:  # Ray raises many unrelated classes here
        raise ClusterError(f"cannot connect to Ray at {address or 'this machine'}: {first_line(error)}") from error
