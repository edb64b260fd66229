"""Query Ray's dashboard on a head for its nodes and runs, without importing Ray."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from forge.cluster.base import ClusterNode
from forge.errors import ClusterError

_TIMEOUT_S = 10.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The URL is on loopback: a proxy of the environment (http_proxy) would look for it on its own machine."""
_KIND = "accelerator_type:"
"""The prefix of Ray's resources that name the kind of a node's GPUs. A node may have `A100` and `A100-80G`."""
_SUPERVISOR = "supervisor-"
"""The prefix of the names of runs' supervisor actors."""


def ray_nodes(url: str, *, token: str, prices: Mapping[str, float | None]) -> list[ClusterNode]:
    """The nodes of a cluster, the head first.

    Args:
        url: the dashboard's URL as this machine reaches it.
        token: the cluster's token.
        prices: known USD per hour by node address.

    Raises: ClusterError if the dashboard does not answer, or refuses the token.
    """
    listed = _get(url, "/api/v0/nodes?detail=1&limit=10000", token)["result"]["result"]
    groups = _get(url, "/api/v0/placement_groups?detail=1&limit=10000", token)["result"]["result"]
    # Only this endpoint has what is used outside placement groups; the dashboard refreshes it every few seconds.
    used = _get(url, "/nodes?view=summary", token).get("nodeLogicalResources") or {}
    reserved = _reserved(groups)
    nodes = [_node(one, used, reserved, prices) for one in listed]
    return sorted(nodes, key=lambda node: (node.kind != "head", node.state != "alive", node.name))


def ray_runs(url: str, *, token: str) -> list[str]:
    """Ids of the runs on a cluster. Raises: ClusterError as `ray_nodes`."""
    listed = _get(url, "/api/v0/actors?limit=10000", token)["result"]["result"]
    names = [str(actor.get("name") or "") for actor in listed if actor.get("state") != "DEAD"]
    runs = [name.removeprefix(_SUPERVISOR) for name in names if name.startswith(_SUPERVISOR)]
    return sorted({run.partition(".")[0] for run in runs})  # a search has a supervisor per running trial


def _get(url: str, path: str, token: str) -> Any:
    request = urllib.request.Request(f"{url}{path}", headers={"Authorization": f"Bearer {token}"})
    try:
        with _DIRECT.open(request, timeout=_TIMEOUT_S) as response:
            return json.load(response)["data"]
    except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
        raise ClusterError(f"the cluster's dashboard does not answer: {error}") from error


def _reserved(groups: list[Mapping[str, Any]]) -> Counter[tuple[str, str]]:
    """Sum up what placement groups reserve, by node id and resource: the slots of runs among them."""
    reserved: Counter[tuple[str, str]] = Counter()
    for group in groups:
        for bundle in group.get("bundles") or () if group.get("state") == "CREATED" else ():
            for resource, count in (bundle.get("unit_resources") or {}).items():
                reserved[str(bundle.get("node_id")), str(resource)] += count
    return reserved


def _free(node_id: str, resource: str, total: float, used: str, reserved: Counter[tuple[str, str]]) -> float:
    """What neither a placement group has reserved nor an actor or task outside of them uses.

    Args:
        used: Ray's lines such as `1.0/4.0 CPU (0.5 used of 2.0 reserved in placement groups)`, in which the first
            number includes what is used inside the groups.
    """
    taken = re.search(rf"([\d.]+)/[\d.]+ {resource}\b(?: \(([\d.]+) used of)?", used)
    outside = float(taken[1]) - float(taken[2] or 0.0) if taken else 0.0
    return max(0.0, total - reserved[node_id, resource] - outside)


def _node(
    node: Mapping[str, Any],
    used: Mapping[str, str],
    reserved: Counter[tuple[str, str]],
    prices: Mapping[str, float | None],
) -> ClusterNode:
    address, total, node_id = str(node["node_ip"]), node.get("resources_total") or {}, str(node["node_id"])
    is_alive, cpus, gpus = node["state"] == "ALIVE", float(total.get("CPU", 0.0)), float(total.get("GPU", 0.0))
    lines, ended_ms = used.get(node_id, ""), float(node.get("end_time_ms") or 0.0)
    return ClusterNode(
        name=address,
        node_id=node_id,
        kind="head" if node.get("is_head_node") else "worker",
        state="alive" if is_alive else "gone",
        num_cpus=cpus,
        free_cpus=_free(node_id, "CPU", cpus, lines, reserved),
        num_gpus=gpus,
        gpu=max((key.removeprefix(_KIND) for key in total if key.startswith(_KIND)), key=len, default=""),
        free_gpus=_free(node_id, "GPU", gpus, lines, reserved),
        gone_s=max(0.0, time.time() - ended_ms / 1000) if ended_ms and not is_alive else None,
        usd_per_hour=prices.get(address) if is_alive else None,
    )
