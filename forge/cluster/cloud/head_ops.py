"""What is asked of Ray: its launcher, where forge does not know the cloud itself, and the Ray on the head."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from forge.cluster.base import ClusterNode
from forge.cluster.cloud.ray_config import HEAD, WORKER_RESOURCE
from forge.cluster.cloud.ray_launcher import Launcher, no_capacity
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError

_DOWN_TIMEOUT_S = 900.0
_ASK_TIMEOUT_S = 120.0

_ASK_FOR_WORKERS = """
import sys, ray
from ray.autoscaler.sdk import request_resources
ray.init(address="auto", logging_level="error", log_to_driver=False)
request_resources(bundles=[{sys.argv[1]: 1}] * int(sys.argv[2]))
"""


class OnHead(Protocol):
    """Runs a command on the head."""

    def __call__(self, command: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[bytes]: ...


def end_all(spec: CloudSpec, launcher: Launcher) -> None:
    """Have Ray's launcher give everything back; it asks the cloud until nothing is left.

    Raises: ClusterError if it cannot.
    """
    if not launcher.file.exists():
        return
    launch = launcher.run("down", "--yes", timeout_s=_DOWN_TIMEOUT_S)
    if not launch.is_done:
        hint = f"; {launch.hint}" if launch.hint else ""
        raise ClusterError(
            f"{spec.provider} could not be asked to end the machines, which go on to cost: {launch.last_words}"
            f"{hint}. The whole log is {launcher.log}"
        )


def head_address(launcher: Launcher) -> str:
    """The head's address, by which this machine reaches it. Raises: ClusterError if it is not found out."""
    launch = launcher.run("get-head-ip", timeout_s=_ASK_TIMEOUT_S)
    if not launch.is_done or not launch.last_words:
        raise ClusterError(f"the head runs, and its address is not known: {launch.last_words}")
    return launch.last_words.split()[-1]


def ask_for_workers(on_head: OnHead, *, count: int) -> None:
    """Have Ray's autoscaler keep at least so many workers, of whichever type is to be had.

    Raises: ClusterError if Ray on the head does not answer.
    """
    _ask(on_head, ["python", "-P", "-c", _ASK_FOR_WORKERS, WORKER_RESOURCE, str(count)])


def refusal_of_workers(on_head: OnHead) -> str | None:
    """The cloud's word for having no room for workers, from the autoscaler's log; None if there is none."""
    logs = "cat ${RAY_TMPDIR:-/tmp}/ray/session_latest/logs/monitor*"
    return no_capacity(on_head(["sh", "-c", logs], timeout_s=_ASK_TIMEOUT_S).stdout.decode(errors="replace"))


def priced(node: ClusterNode, prices: Mapping[str, float | None]) -> ClusterNode:
    """With its price; a worker's is the dearest, for Ray does not say of which type it is."""
    if node.state != "alive":
        return node
    workers = [price for node_type, price in prices.items() if node_type != HEAD]
    known = [price for price in workers if price is not None]
    dearest = max(known) if known and len(known) == len(workers) else None
    return replace(node, usd_per_hour=prices.get(HEAD) if node.kind == "head" else dearest)


def seen(node: ClusterNode, by_address: Mapping[str, ClusterNode]) -> ClusterNode:
    """With what Ray says of it; a machine that Ray does not know yet is starting."""
    ray = by_address.get(node.name)
    if ray is None:
        return replace(node, state="starting" if node.state == "alive" else node.state)
    return replace(node, node_id=ray.node_id, num_cpus=ray.num_cpus, free_cpus=ray.free_cpus)


def _ask(on_head: OnHead, command: list[str]) -> None:
    done = on_head(command, timeout_s=_ASK_TIMEOUT_S)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["it did not say why"]
        raise ClusterError(f"Ray on the head does not answer: {words[-1]}")
