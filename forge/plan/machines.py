"""GPUs that could be rented: offers of the clouds in the numbers that a job may use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forge.errors import PlanError
from forge.plan.gpus import GPUS, Gpu, find_gpu
from forge.plan.throughput import Interconnect
from forge.pricing.offers import Offer

ASSUMED_INTER_NODE_GBPS = 100.0
"""Of machines whose network is unknown."""
_MAX_MACHINES = 2048
_WITHOUT_BF16 = frozenset({"V100-16GB", "V100-32GB", "T4"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """GPUs that a model is to be trained on."""

    name: str
    gpu: Gpu
    num_gpus: int
    interconnect: Interconnect
    usd_per_hour: float | None
    """Of all together; None if unknown."""


def offered_machines(
    offers: Iterable[Offer],
    *,
    spot: bool,
    gpu: Gpu | None = None,
    num_gpus: int | None = None,
    num_machines: int | None = None,
) -> list[list[Machines]]:
    """Return the cheapest machines of each GPU, size and network: each alone and in powers of two.

    Args:
        spot: at spot prices; offers without a price are left out.
        gpu: only machines with this one; otherwise all with GPUs that compute in bf16.
        num_gpus: only as many machines as have so many GPUs together.
        num_machines: only so many.

    Raises: PlanError if there are none, with what is offered.
    """
    cheapest: dict[tuple[str, int, float | None], Offer] = {}
    sizes = set()
    for offer in offers:
        price, found = offer.price(spot=spot), find_gpu(offer.gpu)
        if price is None or found is None or (found != gpu if gpu else found.name in _WITHOUT_BF16):
            continue
        sizes.add(offer.num_gpus)
        if num_gpus is not None and num_gpus % offer.num_gpus:
            continue
        key = (found.name, offer.num_gpus, offer.inter_node_gbps)
        known = cheapest[key].price(spot=spot) if key in cheapest else None
        if known is None or price < known:
            cheapest[key] = offer
    if not cheapest:
        wanted = f"the GPU {gpu.name}" if gpu else "a GPU that computes in bf16"
        kind = "spot" if spot else "on-demand"
        if sizes:
            listed = ", ".join(map(str, sorted(sizes)))
            raise PlanError(f"{num_gpus} GPUs cannot be made of machines that have {listed} of {wanted}")
        raise PlanError(f"no machine with {wanted} has a known {kind} price; `forge prices` lists what is known")

    def counts(offer: Offer) -> Sequence[int]:
        if num_machines is not None:
            return (num_machines,)
        powers = [2**power for power in range(_MAX_MACHINES.bit_length())]
        return powers if num_gpus is None else (num_gpus // offer.num_gpus,)

    return [[several(offer, count, spot=spot) for count in counts(offer)] for offer in cheapest.values()]


def require_gpu(name: str) -> Gpu:
    """Return a GPU by its name. Raises: PlanError with the nearest name if it is unknown."""
    gpu = find_gpu(name)
    if gpu is None:
        names = [known.name for known in GPUS]
        near = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PlanError(f"forge does not know the GPU {name!r}{hint} Known are {', '.join(names)}")
    return gpu


def several(offer: Offer, count: int, *, spot: bool) -> Machines:
    """Return `count` machines of an offer whose GPU is known."""
    gpu = find_gpu(offer.gpu)
    if gpu is None:
        raise PlanError(f"forge does not know the GPU {offer.gpu!r}")
    price = offer.price(spot=spot)
    return Machines(
        name=f"{count} x {offer.instance} ({offer.num_gpus} {gpu.name}), {offer.cloud} {offer.place}",
        gpu=gpu,
        num_gpus=count * offer.num_gpus,
        interconnect=interconnect(gpus_per_node=offer.num_gpus, gbps=offer.inter_node_gbps),
        usd_per_hour=None if price is None else count * price,
    )


def interconnect(*, gpus_per_node: int, gbps: float | None) -> Interconnect:
    """Return the links of machines whose network has this many Gbit/s; None: as assumed."""
    return Interconnect(
        gpus_per_node=gpus_per_node, inter_node_bytes_per_s=(gbps or ASSUMED_INTER_NODE_GBPS) * 1e9 / 8
    )
