"""The regions to which a rented cluster may move, as its head knows them: from the environment of its Ray.

Written when the cluster starts (`forge.cluster.cloud.ray_config`) and read by the supervisor of a run with a
deadline. The prices are those of that day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from forge.cluster.cloud.region_choice import RegionChoice
from forge.foreign import from_record, parse_object

REGIONS_VARIABLE = "FORGE_REGIONS"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRegions:
    """Where a cluster is, and where it may be."""

    here: str
    storage_region: str | None
    """Of the bucket with the checkpoints; None if unknown."""
    on_demand_usd_per_hour: float | None
    """Of the most expensive worker here."""
    spot_usd_per_hour: Mapping[str, float] = field(default_factory=dict)
    """Of the cheapest worker by place, where the cluster's types are sold as spot machines; `here` among them."""

    @property
    def others(self) -> Sequence[str]:
        return [place for place in self.spot_usd_per_hour if place != self.here]


def regions_of(choice: RegionChoice, *, here: str) -> ClusterRegions:
    """Return the places of a choice, of which the cluster is in one."""
    spot = {one.place: one.usd_per_hour for one in choice.options if one.is_spot and one.usd_per_hour is not None}
    workers = next((one.plan.workers for one in choice.options if one.place == here), ())
    on_demand = [one.usd_per_hour for one in workers if not one.is_spot and one.usd_per_hour is not None]
    return ClusterRegions(
        here=here,
        storage_region=choice.storage_region,
        on_demand_usd_per_hour=max(on_demand, default=None),
        spot_usd_per_hour=spot,
    )


def to_variable(regions: ClusterRegions) -> str:
    """Return the value of `FORGE_REGIONS`."""
    return json.dumps(asdict(regions), separators=(",", ":"))


def read_regions(environment: Mapping[str, str]) -> ClusterRegions | None:
    """Return the regions of this head; None where the cluster is not rented or may not move."""
    try:
        found = from_record(ClusterRegions, parse_object(environment[REGIONS_VARIABLE].encode()))
    except (KeyError, ValueError):
        return None
    return found if found.others else None
