"""What `forge cluster probe` measured of the links between a cluster's nodes, kept for plans on that cluster."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from forge.config.cluster import ClusterSpec
from forge.fs import make_private, state_home, write_atomic

_SLOW_SHARE = 0.5
"""Of the median: below it, a node's link is named. All ranks wait for the slowest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLink:
    """The link of one node to the others."""

    node: str
    """Its address."""
    device: str
    """The kind of its GPUs, or of its processor."""
    num_ranks: int
    """Its GPUs; 1 on CPU."""
    within_bytes_per_s: float | None
    """Between its GPUs; None of a single one."""
    between_bytes_per_s: float | None
    """To and from another node at once, in each direction; None of a single node. The faster of its neighbours
    counts, so that a slow one does not make it slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLinks:
    """The links between a cluster's nodes."""

    nodes: tuple[NodeLink, ...]
    all_gather_bytes_per_s: float | None
    """Bytes that each rank gets in an all-gather over all ranks, per second; None of a single rank."""
    measured_at: float

    @property
    def num_ranks_per_node(self) -> int:
        """Of most nodes."""
        return Counter(node.num_ranks for node in self.nodes).most_common(1)[0][0]

    @property
    def within_bytes_per_s(self) -> float | None:
        """Between the GPUs of the slowest node, for which all ranks wait; None of nodes with one GPU."""
        return min((node.within_bytes_per_s for node in self.nodes if node.within_bytes_per_s), default=None)

    def warnings(self) -> list[str]:
        """Name the nodes that differ from most others in their GPUs, and those whose link is slow."""
        return [*self._differing(), *self._slow()]

    def _differing(self) -> Iterator[str]:
        kinds = Counter((node.device, node.num_ranks) for node in self.nodes)
        (device, count), _ = kinds.most_common(1)[0]
        for node in self.nodes:
            if (node.device, node.num_ranks) != (device, count):
                own, others = _hardware(node.device, node.num_ranks), _hardware(device, count)
                yield f"{node.node} has {own}, most nodes {others}: every step takes as long as on the slowest"

    def _slow(self) -> Iterator[str]:
        rates = [node.between_bytes_per_s for node in self.nodes if node.between_bytes_per_s is not None]
        median = statistics.median(rates) if rates else 0.0
        for node in self.nodes:
            rate = node.between_bytes_per_s
            if rate is not None and rate < _SLOW_SHARE * median:
                yield f"{node.node} reaches {gbps(rate)} Gbit/s, half of the nodes {gbps(median)} or more"


def gbps(bytes_per_s: float) -> str:
    """Bytes per second as Gbit/s, with three digits."""
    return f"{bytes_per_s * 8e-9:.3g}"


def keep_links(links: MeasuredLinks, *, spec: ClusterSpec) -> None:
    """Keep the links of a cluster for plans, until its file changes. Raises: OSError."""
    folder = state_home() / "links"
    make_private(folder)
    write_atomic(folder / f"{spec.name}.json", json.dumps({"spec": _digest(spec), "links": asdict(links)}) + "\n")


def kept_links(spec: ClusterSpec) -> MeasuredLinks | None:
    """Return what was measured on the cluster of this file; None if nothing was, or the file has changed since."""
    try:
        kept = json.loads((state_home() / "links" / f"{spec.name}.json").read_text())
        if kept["spec"] != _digest(spec):
            return None
        return links_from(kept["links"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def links_from(record: Mapping[str, Any]) -> MeasuredLinks:
    """Build from JSON values. Raises: KeyError, TypeError or ValueError if they are not those of links."""
    nodes = tuple(
        NodeLink(
            node=str(node["node"]),
            device=str(node["device"]),
            num_ranks=int(node["num_ranks"]),
            within_bytes_per_s=_rate(node["within_bytes_per_s"]),
            between_bytes_per_s=_rate(node["between_bytes_per_s"]),
        )
        for node in record["nodes"]
    )
    if not nodes:
        raise ValueError("no nodes")
    return MeasuredLinks(
        nodes=nodes,
        all_gather_bytes_per_s=_rate(record["all_gather_bytes_per_s"]),
        measured_at=float(record["measured_at"]),
    )


def _rate(value: Any) -> float | None:
    rate = None if value is None else float(value)
    if rate is not None and not 0 < rate < 1e15:
        raise ValueError(f"{rate} is no rate")
    return rate


def _hardware(device: str, count: int) -> str:
    return f"{count} x {device}" if count > 1 else device


def _digest(spec: ClusterSpec) -> str:
    return hashlib.blake2b(spec.model_dump_json().encode(), digest_size=16).hexdigest()
