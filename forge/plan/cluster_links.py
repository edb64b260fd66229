"""The links between a cluster's GPUs, by its file and the catalogue of machine types; the rest is assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forge.config.cluster import CloudSpec, ClusterSpec, KubernetesSpec
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


def cluster_links(spec: ClusterSpec | None) -> ClusterLinks:
    """Return the links of a cluster's workers: as `forge cluster probe` measured them, otherwise by its file, of a
    rented one those of its cheapest machine type.

    Args:
        spec: the cluster file; None if the cluster is unknown.
    """
    measured = None if spec is None else kept_links(spec)
    if measured is not None and (found := _measured(measured)) is not None:
        return found
    if isinstance(spec, KubernetesSpec):
        return _links(spec.gpus_per_worker, None, source="the cluster file")
    if not isinstance(spec, CloudSpec):
        return _links(_ASSUMED_GPUS, None, source=None)
    known = machine_types(spec.provider)
    machines = [known[name] for name in workers_of(spec) if name in known]
    if not machines:
        return _links(_ASSUMED_GPUS, None, source=None)
    first = min(machines, key=lambda machine: _price(machine, spec))
    several = f", the cheapest of the cluster's {len(machines)} types" if len(machines) > 1 else ""
    return _links(first.num_gpus, first.inter_node_gbps, source=f"{first.name}{several}")


def _measured(links: MeasuredLinks) -> ClusterLinks | None:
    """The links as measured; None where a single node was measured, which says nothing of the others."""
    if len(links.nodes) < 2 or links.all_gather_bytes_per_s is None:
        return None
    # An all-gather moves its bytes at the share of the network that collectives reach.
    found = Interconnect(
        gpus_per_node=links.num_ranks_per_node,
        inter_node_bytes_per_s=links.all_gather_bytes_per_s / Efficiency().inter_node,
    )
    measured = (
        f"an all-gather over {counted(len(links.nodes), 'machine')} at {gbps(links.all_gather_bytes_per_s)} Gbit/s"
    )
    note = f"{_per_machine(found.gpus_per_node)}, {measured}: forge cluster probe, {format_date(links.measured_at)}"
    return ClusterLinks(interconnect=found, note="; ".join([note, *links.warnings()]))


def _per_machine(gpus: int) -> str:
    return f"{gpus} GPU{'s' * (gpus != 1)} in a machine"


def _links(gpus: int, gbps: float | None, *, source: str | None) -> ClusterLinks:
    per_machine = _per_machine(gpus)
    between = f"{gbps or ASSUMED_INTER_NODE_GBPS:g} Gbit/s between machines"
    if source is None:
        note = f"assumed: {per_machine}, {between}"
    elif gbps is None:
        note = f"{per_machine} by {source}; assumed: {between}"
    else:
        note = f"{per_machine}, {between}: {source}"
    return ClusterLinks(interconnect=interconnect(gpus_per_node=gpus, gbps=gbps), note=note)


def _price(machine: MachineType, spec: CloudSpec) -> float:
    if machine.name in spec.usd_per_hour:
        return spec.usd_per_hour[machine.name]
    price = machine.spot_usd_per_hour or machine.usd_per_hour if spec.spot else machine.usd_per_hour
    return math.inf if price is None else price
