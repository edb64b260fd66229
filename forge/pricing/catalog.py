"""Catalogue of the machine types that clouds rent: GPUs, size and list price.

The data and their sources are in `catalog.toml` next to this file. The catalogue finds machine types by GPU,
gives Ray their size where Ray's cloud provider does not know it, and a list price where no live price is known.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from forge.config.cluster import CloudSpec
from forge.errors import ClusterError, JobFileError

_HEADS = {"aws": "m6i.xlarge", "gcp": "e2-standard-4", "azure": "Standard_D4s_v5"}
"""Four CPUs and 16 GiB are enough for Ray's control store, the supervisor and the recorder."""

_SMALLEST_WORKER_CPUS = 8
"""For workers without GPU, if the cluster file lists no `instance_types`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineType:
    """One machine type of a cloud."""

    name: str
    gpu: str
    """Its name in a cluster file; empty for a machine without GPU."""
    num_gpus: int
    num_cpus: int
    memory_gib: float
    usd_per_hour: float | None
    """On-demand price; None if unknown, as for the spot price."""
    spot_usd_per_hour: float | None


@functools.cache
def machine_types(cloud: str) -> Mapping[str, MachineType]:
    """Return all machine types of a cloud, by name."""
    return {
        name: MachineType(
            name=name,
            gpu=gpu,
            num_gpus=num_gpus,
            num_cpus=num_cpus,
            memory_gib=memory_gib,
            usd_per_hour=price or None,
            spot_usd_per_hour=spot_price or None,
        )
        for name, (gpu, num_gpus, num_cpus, memory_gib, price, spot_price) in _table()[cloud].items()
    }


def workers_of(spec: CloudSpec) -> tuple[str, ...]:
    """Return the names of the machine types that a worker may have.

    Raises: JobFileError if the GPU is unknown and the file lists no types, or if a listed type has another GPU.
    """
    known = machine_types(spec.provider)
    wanted = "" if spec.gpu == "none" else spec.gpu
    for name in spec.instance_types:
        if name in known and known[name].gpu != wanted:
            has = known[name].gpu or "no GPU"
            raise JobFileError(f"has {has}; the file asks for {spec.gpu}", key="instance_types", value=name)
    if spec.instance_types:
        return spec.instance_types
    found = tuple(
        name
        for name, machine in known.items()
        if machine.gpu == wanted and (wanted or machine.num_cpus >= _SMALLEST_WORKER_CPUS)
    )
    if not found:
        gpus = sorted({machine.gpu for machine in known.values() if machine.gpu})
        near = difflib.get_close_matches(spec.gpu.upper(), gpus, n=1)
        raise JobFileError(
            f"is not in forge's catalogue for {spec.provider}, which has {', '.join(gpus)}; "
            "for other machines list instance_types",
            key="gpu",
            value=spec.gpu,
            nearest=near[0] if near else None,
        )
    return found


def head_of(spec: CloudSpec) -> str:
    """Return the machine type of the head."""
    return spec.head or _HEADS[spec.provider]


def size_of(name: str, *, cloud: str) -> MachineType:
    """Return a machine type, for the clouds whose Ray provider cannot look up its size.

    Raises: ClusterError if the catalogue does not have it.
    """
    known = machine_types(cloud)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        similar = f"; similar names are {', '.join(near)}" if near else ""
        raise ClusterError(f"forge's catalogue does not have {cloud}'s machine type '{name}'{similar}")
    return known[name]


def regions_of(spec: CloudSpec) -> tuple[str, ...]:
    """Return the regions (zones on gcp) to try, in order: those of the file, or the catalogue's for `auto`."""
    return tuple(_table()["regions"][spec.provider]) if spec.regions == ("auto",) else spec.regions


@functools.cache
def _table() -> dict[str, Any]:
    text = files("forge.pricing").joinpath("catalog.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
