"""What Ray's dashboard on a head says of the cluster, asked for without Ray."""

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
_SUPERVISOR = "supervisor-"
"""How the names of the actors begin that keep runs going."""


def ray_nodes(url: str, *, token: str, prices: Mapping[str, float | None]) -> list[ClusterNode]:
    """The nodes of a cluster, the head first.

    Args:
        url: of the dashboard, as it is reached from here.
        token: of the cluster.
        prices: USD per hour by address, as far as they are known.

    Raises: ClusterError if it does not answer, or refuses the token.
    """
    listed = _get(url, "/api/v0/nodes?detail=1&limit=10000", token)["result"]["result"]
    # What is in use is known to the dashboard alone, which looks only every few seconds.
    used = _get(url, "/nodes?view=summary", token).get("nodeLogicalResources") or {}
    nodes = [_node(one, used, prices) for one in listed]
    return sorted(nodes, key=lambda node: (node.kind != "head", node.state != "alive", node.name))


def ray_runs(url: str, *, token: str) -> list[str]:
    """Ids of the runs that are at work on a cluster. Raises: ClusterError as `ray_nodes`."""
    listed = _get(url, "/api/v0/actors?limit=10000", token)["result"]["result"]
    names = [str(actor.get("name") or "") for actor in listed if actor.get("state") != "DEAD"]
    runs = [name.removeprefix(_SUPERVISOR) for name in names if name.startswith(_SUPERVISOR)]
    return sorted({run.partition(".")[0] for run in runs})  # a search has one for each trial that is on


def _get(url: str, path: str, token: str) -> Any:
    request = urllib.request.Request(f"{url}{path}", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
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
