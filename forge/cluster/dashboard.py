"""What Ray's dashboard on a head says of the cluster's nodes, asked for without Ray."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping

from forge.cluster.base import Node
from forge.errors import ClusterError

_TIMEOUT_S = 10.0


def ray_nodes(url: str, *, token: str, prices: Mapping[str, float | None]) -> list[Node]:
    """The nodes of a cluster, the head first.

    Args:
        url: of the dashboard, as it is reached from here.
        token: of the cluster.
        prices: USD per hour by address, as far as they are known.

    Raises: ClusterError if it does not answer, or refuses the token.
    """
    request = urllib.request.Request(f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            summary = json.load(response)["data"]["summary"]
    except (OSError, ValueError, KeyError) as error:
        raise ClusterError(f"the cluster's dashboard does not answer: {error}") from error
    nodes = [_node(one["raylet"], prices) for one in summary]
    return sorted(nodes, key=lambda node: (node.kind != "head", node.state != "alive", node.name))


def _node(raylet: Mapping[str, object], prices: Mapping[str, float | None]) -> Node:
    address = str(raylet["nodeManagerAddress"])
    resources = raylet.get("resourcesTotal")
    total = resources if isinstance(resources, dict) else {}
    is_alive = raylet["state"] == "ALIVE"
    return Node(
        name=address,
        kind="head" if raylet.get("isHeadNode") else "worker",
        state="alive" if is_alive else "gone",
        num_cpus=float(total.get("CPU", 0.0)),
        num_gpus=float(total.get("GPU", 0.0)),
        usd_per_hour=prices.get(address) if is_alive else None,
    )
