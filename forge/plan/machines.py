"""GPUs that could be rented: offers of the clouds in the numbers that a job may use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forge.errors import PlanError
from forge.plan.gpus import Gpu, find_gpu
from forge.plan.throughput import Interconnect
from forge.pricing.offer import Offer

ASSUMED_INTER_NODE_GBPS = 100.0
"""Of machines whose network is unknown."""
MAX_MACHINES = 2048
WITHOUT_BF16 = frozenset({"V100-16GB", "V100-32GB", "T4"})


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
    offers: Iterable[Offer], *, spot: bool, num_gpus: int | None = None, num_machines: int | None = None
) -> list[list[Machines]]:
    """Return the cheapest machines of each GPU, size and network: each alone and in powers of two.

    Args:
        offers: the cheapest first; those whose GPU is unknown, does not compute in bf16, or has no price are left
            out.
        spot: at spot prices.
        num_gpus: only as many machines as have so many GPUs together.
        num_machines: only so many.

    Raises: PlanError if none remain.
    """
    cheapest: dict[tuple[str, int, float | None], Offer] = {}
    for offer in offers:
        gpu = find_gpu(offer.gpu)
        if gpu is not None and gpu.name not in WITHOUT_BF16 and offer.price(spot=spot) is not None:
            cheapest.setdefault((gpu.name, offer.num_gpus, offer.inter_node_gbps), offer)
    if not cheapest:
        raise PlanError("none of these machines has a known price and a GPU that computes in bf16")
    chosen = [offer for offer in cheapest.values() if num_gpus is None or num_gpus % offer.num_gpus == 0]
    if not chosen:
        sizes = ", ".join(map(str, sorted({offer.num_gpus for offer in cheapest.values()})))
        raise PlanError(f"{num_gpus} GPUs cannot be made of machines that have {sizes}")

    def counts(offer: Offer) -> Sequence[int]:
        if num_gpus is not None:
            return (num_gpus // offer.num_gpus,)
        if num_machines is not None:
            return (num_machines,)
        return [2**power for power in range(MAX_MACHINES.bit_length())]

    return [[several(offer, count, spot=spot) for count in counts(offer)] for offer in chosen]


def several(offer: Offer, count: int, *, spot: bool) -> Machines:
    """Return `count` machines of an offer whose GPU is known."""
    gpu = find_gpu(offer.gpu)
    if gpu is None:
        raise PlanError(f"forge does not know the GPU {offer.gpu!r}")
    price = offer.price(spot=spot)
    return Machines(
        name=f"{count} x {offer.instance} ({offer.num_gpus} {gpu.name}), {'spot' if spot else 'on demand'}, "
        f"{offer.cloud} {offer.place if spot else offer.region}",
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
