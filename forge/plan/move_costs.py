"""What it costs to move a run to another region of its cloud: the traffic of its checkpoints.

One Ray cluster has machines of one region, because ranks all-reduce in every step: between regions that would be
slower than the step itself. So a run moves as a whole: it stops with a checkpoint, and the machines of another
region read that from the bucket, which stays where it is. The corpus is sent again from the machine with the
client; what enters a cloud is free on AWS, Azure and GCP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from forge.config.cluster import CloudSpec
from forge.plan.plan import DraftPlan
from forge.plan.space import checkpoint_bytes
from forge.pricing.transfer import INTERNET, cloud_of, egress_usd_per_gib, region_of
from forge.units import format_duration

MOVE_S = 900.0
"""While a run moves, nothing trains for so long: a checkpoint, the end of the machines, and the start of a head on
which forge is installed (assumed; an image with forge takes a third). The start of workers is not included."""

DEAREST_USD_PER_GIB = 0.19
"""Decides about a move whose price is unknown: the highest price of traffic in `forge/pricing/transfer.toml`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCosts:
    """Traffic of a run that moves, in USD; None: a price, or the bucket's region, is unknown."""

    to: str
    checkpoint_gib: float
    read_usd: float | None
    """For the checkpoint that the run resumes from, read once."""
    write_usd: float | None
    """For each checkpoint that is written from there."""


def move_costs(plan: DraftPlan, *, cloud: str, storage_region: str | None, to: str) -> MoveCosts:
    """Return what moving a run costs.

    Args:
        cloud: of the machines.
        storage_region: of the checkpoints' bucket; None if unknown.
        to: region of the machines after the move; on GCP also a zone.
    """
    gib = checkpoint_bytes(plan.model, plan.job.training) / 2**30
    place = cloud_of(plan.job.checkpoint.to)
    if place not in (None, cloud):  # another cloud's bucket: through the internet
        read = egress_usd_per_gib(place, storage_region, to=INTERNET) if place and storage_region else None
        write = egress_usd_per_gib(cloud, to, to=INTERNET)
    elif storage_region is None:
        read = write = None
    else:
        read = egress_usd_per_gib(cloud, storage_region, to=region_of(to))
        write = egress_usd_per_gib(cloud, to, to=storage_region)
    return MoveCosts(
        to=to,
        checkpoint_gib=gib,
        read_usd=None if read is None else read * gib,
        write_usd=None if write is None else write * gib,
    )


def describe_move(costs: MoveCosts) -> str:
    """Say what a move costs, in one line."""
    read, write = (_usd(price) for price in (costs.read_usd, costs.write_usd))
    return (
        f"a move to {costs.to} takes about {format_duration(MOVE_S)} and the start of workers; its checkpoint of "
        f"{costs.checkpoint_gib:.3g} GiB costs {read} to read there, and each later one {write} to write"
    )


def moving_note(plan: DraftPlan, spec: CloudSpec, *, regions: Iterable[str]) -> str | None:
    """Say whether a run with a deadline may move between the regions of a cluster file; None without a deadline.

    Args:
        regions: those in which the file's machines are sold.
    """
    if plan.job.resources.deadline is None:
        return None
    places = sorted(set(regions))
    if len(places) < 2:
        return f"the run stays in one region: '{spec.name}' allows {places[0] if places else 'none'} alone"
    costs = [move_costs(plan, cloud=spec.provider, storage_region=spec.storage_region, to=one) for one in places]
    known = [one.read_usd for one in costs if one.read_usd is not None]
    price = f"up to {max(known):.2f} USD of traffic" if known else "traffic at an unknown price"
    price += "" if len(known) in (0, len(costs)) else f" ({len(costs) - len(known)} of the prices are unknown)"
    where = "" if spec.storage_region or known else "; give storage_region in the file"
    how = "by itself while it is followed" if plan.job.resources.move_regions else "by forge cluster move"
    return (
        f"the run can move between {len(places)} regions {how}: {format_duration(MOVE_S)} without machines, and "
        f"{price} for its checkpoint of {costs[0].checkpoint_gib:.3g} GiB{where}"
    )


def _usd(price: float | None) -> str:
    return "an unknown price" if price is None else f"{price:.2f} USD"
