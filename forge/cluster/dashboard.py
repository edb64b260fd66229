"""Query Ray's dashboard on a head for its nodes and runs, without importing Ray."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from forge.cluster.base import ClusterNode
from forge.errors import ClusterError

_TIMEOUT_S = 10.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The URL is on loopback: a proxy of the environment (http_proxy) would look for it on its own machine."""
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
    # Only this endpoint has the CPUs in use; the dashboard refreshes it every few seconds.
    used = _get(url, "/nodes?view=summary", token).get("nodeLogicalResources") or {}
    nodes = [_node(one, used, prices) for one in listed]
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


def _node(node: Mapping[str, Any], used: Mapping[str, str], prices: Mapping[str, float | None]) -> ClusterNode:
    address, total = str(node["node_ip"]), node.get("resources_total") or {}
    is_alive, cpus = node["state"] == "ALIVE", float(total.get("CPU", 0.0))
    taken = re.search(r"([\d.]+)/[\d.]+ CPU", used.get(str(node["node_id"]), ""))
    return ClusterNode(
        name=address,
        node_id=str(node["node_id"]),
        kind="head" if node.get("is_head_node") else "worker",
        state="alive" if is_alive else "gone",
        num_cpus=cpus,
        free_cpus=cpus - float(taken[1]) if taken else cpus,
        num_gpus=float(total.get("GPU", 0.0)),
        usd_per_hour=prices.get(address) if is_alive else None,
    )
