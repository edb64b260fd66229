"""What is asked of Ray: its launcher, where forge does not know the cloud itself, and the Ray on the head."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Protocol

from forge.cluster.base import Node
from forge.cluster.launcher import Launcher, no_capacity
from forge.cluster.render import HEAD, WORKER_RESOURCE
from forge.errors import ClusterError
from forge.spec.cluster import CloudSpec

_DOWN_TIMEOUT_S = 900.0
_ASK_TIMEOUT_S = 120.0

_LIST_NODES = """
import json, ray
ray.init(address="auto", logging_level="error", log_to_driver=False)
print(json.dumps([
    {
        "address": node["NodeManagerAddress"],
        "is_alive": node["Alive"],
        "is_head": "node:__internal_head__" in node["Resources"],
        "node_type": node.get("NodeTypeName", node["Labels"].get("ray.io/node-group", "")),
        "cpus": node["Resources"].get("CPU", 0.0),
        "gpus": node["Resources"].get("GPU", 0.0),
    }
    for node in ray.nodes()
]))
"""

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
    _ask(on_head, ["python", "-c", _ASK_FOR_WORKERS, WORKER_RESOURCE, str(count)])


def refusal_of_workers(on_head: OnHead) -> str | None:
    """The cloud's word for having no room for workers, from the autoscaler's log; None if there is none."""
    logs = "cat ${RAY_TMPDIR:-/tmp}/ray/session_latest/logs/monitor*"
    return no_capacity(on_head(["sh", "-c", logs], timeout_s=_ASK_TIMEOUT_S).stdout.decode(errors="replace"))


def list_nodes(on_head: OnHead, *, prices: Mapping[str, float | None]) -> list[Node]:
    """The machines by the word of Ray on the head. Raises: ClusterError if it does not answer."""
    words = _ask(on_head, ["python", "-c", _LIST_NODES])
    return [
        Node(
            name=node["address"],
            kind="head" if node["is_head"] else "worker",
            state="alive" if node["is_alive"] else "gone",
            num_cpus=node["cpus"],
            num_gpus=node["gpus"],
            usd_per_hour=prices.get(HEAD if node["is_head"] else node["node_type"]) if node["is_alive"] else None,
        )
        for node in json.loads(words.splitlines()[-1])
    ]


def _ask(on_head: OnHead, command: list[str]) -> str:
    done = on_head(command, timeout_s=_ASK_TIMEOUT_S)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["it did not say why"]
        raise ClusterError(f"Ray on the head does not answer: {words[-1]}")
    return done.stdout.decode()
