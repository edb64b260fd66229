"""The links between a cluster's GPUs, by its file and the catalogue of machine types; the rest is assumed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from forge.config.cluster import CloudSpec, ClusterSpec, KubernetesSpec, LocalSpec
from forge.plan.machines import ASSUMED_INTER_NODE_GBPS, interconnect
from forge.plan.measured_links import MeasuredLinks, gbps, kept_links
from forge.plan.throughput import Efficiency, Interconnect
from forge.pricing.catalog import MachineType, machine_types, workers_of
from forge.units import counted, format_date

_ASSUMED_GPUS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLinks:
    """The links between GPUs that a forecast counts with."""

    interconnect: Interconnect
    note: str
    """What they are based on, and what of them is assumed."""
    warnings: tuple[str, ...] = ()
    """Nodes that differ from most others, by name."""


def cluster_links(spec: ClusterSpec | None, *, gpus_of_nodes: Sequence[int] = ()) -> ClusterLinks:
    """Return the links of a cluster's workers: as `forge cluster probe` measured them, otherwise by its nodes and
    its file, of a rented one those of its cheapest machine type.

    Args:
        spec: the cluster file; None if the cluster is unknown.
        gpus_of_nodes: the number of GPUs of each node that runs.
    """
    measured = None if spec is None else kept_links(spec)
    if measured is not None and (found := _measured(measured)) is not None:
        return found
    machine, several = (None, "") if not isinstance(spec, CloudSpec) else _cheapest(spec)
    network_gbps = None if machine is None else machine.inter_node_gbps
    warnings: tuple[str, ...] = ()
    if gpus_of_nodes:
        counts = Counter(gpus_of_nodes)
        gpus, source = max(counts, key=lambda count: (counts[count], -count)), "the nodes that run"
        if len(counts) > 1:
            listed = ", ".join(f"{num} with {count}" for count, num in sorted(counts.items(), reverse=True))
            warnings = (f"nodes have different numbers of GPUs ({listed}): groups of ranks are planned for {gpus}",)
    elif isinstance(spec, KubernetesSpec):
        gpus, source = spec.gpus_per_worker, "the cluster file"
    elif machine is not None:
        gpus, source = machine.num_gpus, ""
    else:
        gpus, source = _ASSUMED_GPUS, None
    known = _per_machine(gpus) + (f" by {source}" if source else "")
    between = f"{network_gbps or ASSUMED_INTER_NODE_GBPS:g} Gbit/s between machines"
    if source is None:
        note = f"assumed: {known}, {between}"
    elif network_gbps is None or machine is None:
        note = f"{known}; assumed: {between}"
    else:
        note = f"{known}, {between}: {machine.name}{several}"
    if spec is not None and not isinstance(spec, LocalSpec):
        note += f"; to measure them: forge cluster probe {spec.name}"
    return ClusterLinks(
        interconnect=interconnect(gpus_per_node=gpus, gbps=network_gbps), note=note, warnings=warnings
    )


def _cheapest(spec: CloudSpec) -> tuple[MachineType | None, str]:
    """Return the cheapest machine type of a rented cluster that the catalogue has, and of how many it is that."""
    known = machine_types(spec.provider)
    machines = [known[name] for name in workers_of(spec) if name in known]
    if not machines:
        return None, ""
    several = f", the cheapest of the cluster's {len(machines)} types" if len(machines) > 1 else ""
    return min(machines, key=lambda machine: _price(machine, spec)), several


def _measured(links: MeasuredLinks) -> ClusterLinks | None:
    """The links as measured; None where a single node was measured, which says nothing of the others."""
    if len(links.nodes) < 2 or links.all_gather_bytes_per_s is None:
        return None
    # An all-gather moves its bytes at the share of the links that collectives reach.
    efficiency, within = Efficiency(), links.within_bytes_per_s
    found = Interconnect(
        gpus_per_node=links.num_ranks_per_node,
        inter_node_bytes_per_s=links.all_gather_bytes_per_s / efficiency.inter_node,
        intra_node_bytes_per_s=None if within is None else within / efficiency.intra_node,
    )
    measured = (
        f"an all-gather over {counted(len(links.nodes), 'machine')} at {gbps(links.all_gather_bytes_per_s)} Gbit/s"
    )
    inside = "" if within is None else f", within a machine at {gbps(within)}"
    note = f"{_per_machine(found.gpus_per_node)}, {measured}{inside}: forge cluster probe, "
    return ClusterLinks(
        interconnect=found, note=note + format_date(links.measured_at), warnings=tuple(links.warnings())
    )


def _per_machine(gpus: int) -> str:
    return f"{gpus} GPU{'s' * (gpus != 1)} in a machine"


def _price(machine: MachineType, spec: CloudSpec) -> float:
    if machine.name in spec.usd_per_hour:
        return spec.usd_per_hour[machine.name]
    price = machine.spot_usd_per_hour or machine.usd_per_hour if spec.spot else machine.usd_per_hour
    return math.inf if price is None else price
