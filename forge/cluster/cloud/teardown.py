"""Terminate what a cluster has rented, region by region, and delete what forge created for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge.cluster.base import NodeProgress, OnProgress
from forge.cluster.cloud import aws, aws_network, firewall
from forge.cluster.cloud.ray_launcher import RayLauncher
from forge.cluster.cloud.state import ClusterIdentity, cluster_folder, delete_cluster
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError

_DOWN_TIMEOUT_S = 900.0


def launcher_for(spec: CloudSpec, *, region: str, on_progress: OnProgress) -> RayLauncher:
    """Ray's launcher for a cluster, which reports progress for a region."""
    return RayLauncher(
        folder=cluster_folder(spec.name),
        report=lambda message: on_progress(NodeProgress(name=region, message=message)),
    )


def end_region(spec: CloudSpec, *, cluster: ClusterIdentity, region: str, on_progress: OnProgress) -> list[str]:
    """Terminate all machines in a region, and delete what they needed. Returns: what is left, one line each.

    Raises: ClusterError if the cloud cannot be asked, or what is named after the cluster is not its own.
    """
    on_progress(NodeProgress(name=region, message="terminating its machines"))
    if spec.provider == "aws":
        left = [f"machine {id} in {region}" for id in aws.terminate_all(cluster, region=region)]
        left += aws_network.remove_network(cluster, region=region) if not left else []
    else:
        if firewall.require_own(spec, cluster=cluster):
            _ray_down(spec, launcher_for(spec, region=region, on_progress=on_progress))
        left = firewall.remove_rules(spec, cluster=cluster)
    message = "gone" if not left else "something is left"
    on_progress(NodeProgress(name=region, message=message, is_failure=bool(left)))
    return left


def forget(spec: CloudSpec, *, state: Mapping[str, Any]) -> None:
    """Delete the cluster's roles in the cloud and its state on this machine, once nothing is left in any region."""
    if spec.provider == "aws" and state.get("tried"):
        aws_network.remove_profiles(ClusterIdentity.of(spec.name, state))
    delete_cluster(spec.name)


def _ray_down(spec: CloudSpec, launcher: RayLauncher) -> None:
    """Run `ray down`, which asks the cloud until nothing is left. Raises: ClusterError if it fails."""
    if not launcher.file.exists():
        return
    result = launcher.run("down", "--yes", timeout_s=_DOWN_TIMEOUT_S)
    if not result.is_done:
        hint = f"; {result.hint}" if result.hint else ""
        raise ClusterError(
            f"{spec.provider} could not be asked to terminate the machines, which still cost: {result.output}"
            f"{hint}. The log is {launcher.log}"
        )
