"""The machine types that can be rented: their GPUs, their size, and what they cost by the price list.

The table is `catalog.toml`, beside this file, with its sources. It chooses machine types by GPU, tells Ray
how large they are where the cloud does not, and gives a price where nobody else does.
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
"""Four CPUs and 16 GiB: Ray's control store, the supervisor and the records want no more."""

_SMALLEST_WORKER_CPUS = 8
"""Of a worker without GPU, where the file names no type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineType:
    """One size of machine."""

    name: str
    gpu: str
    """As a cluster file calls it; empty if it has none."""
    num_gpus: int
    num_cpus: int
    memory_gib: float
    usd_per_hour: float | None
    """On demand."""
    spot_usd_per_hour: float | None

    def price(self, *, spot: bool) -> float | None:
        """USD per hour by the list; None if the list does not tell."""
        return self.spot_usd_per_hour if spot else self.usd_per_hour


@functools.cache
def machine_types(cloud: str) -> Mapping[str, MachineType]:
    """All that the table knows of a cloud, by name."""
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
    """The names of the machine types among which workers are chosen.

    Raises: JobFileError if the GPU is not known and no type is named, or if a type has another GPU.
    """
    known = machine_types(spec.provider)
    wanted = "" if spec.gpu == "none" else spec.gpu
    for name in spec.instance_types:
        if name in known and known[name].gpu != wanted:
            has = known[name].gpu or "no GPU"
            raise JobFileError(f"has {has}, and the file asks for '{spec.gpu}'", key="instance_types", value=name)
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
            f"is not known on {spec.provider}, which has {', '.join(gpus)}; other machines are named by "
            "instance_types",
            key="gpu",
            value=spec.gpu,
            nearest=near[0] if near else None,
        )
    return found


def head_of(spec: CloudSpec) -> str:
    """The head's machine type."""
    return spec.head or _HEADS[spec.provider]


def size_of(name: str, *, cloud: str) -> MachineType:
    """The size of a machine type, for the clouds whose Ray provider does not find it out itself.

    Raises: ClusterError if the table does not know it.
    """
    known = machine_types(cloud)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        like = f"; like it are {', '.join(near)}" if near else ""
        raise ClusterError(f"forge does not know how large {cloud}'s machine type '{name}' is{like}")
    return known[name]


def regions_of(spec: CloudSpec) -> tuple[str, ...]:
    """The regions to try, on gcp zones: those of the file, or for `auto` the table's, in order."""
    return tuple(_table()["regions"][spec.provider]) if spec.regions == ("auto",) else spec.regions


@functools.cache
def _table() -> dict[str, Any]:
    text = files("forge.pricing").joinpath("catalog.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
