"""What a job costs on one cluster: on the machines that its file allows, or by the price that its file states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from forge.config.cluster import CloudSpec, ClusterSpec
from forge.plan.bill import describe
from forge.plan.candidates import Candidate, find_candidates
from forge.plan.durations import ClusterCost
from forge.plan.forecast import FormerRun
from forge.plan.plan import DraftPlan
from forge.pricing.catalog import workers_of
from forge.pricing.offer import Offer


def cluster_cost(
    plan: DraftPlan,
    spec: ClusterSpec,
    offers: Iterable[Offer],
    *,
    usd_per_hour: float | None,
    former: Iterable[FormerRun] = (),
) -> ClusterCost | None:
    """Return what a job costs on a cluster; None if its price or the job's duration is unknown.

    Of a rented cluster with GPUs: on the cheapest of the machines that its file allows, as many as the file and the
    job allow. Of other machines: the likely hours at the largest number of workers, at the price of all machines.

    Args:
        usd_per_hour: the most that the cluster costs; None if unknown.
        former: measured runs, the newest first.
    """
    if isinstance(spec, CloudSpec) and spec.gpu != "none":
        found = _on_cloud(plan, spec, offers, former=former)
        if found is not None:
            rate = found.usd_per_hour if usd_per_hour is None else usd_per_hour
            return ClusterCost(machines=describe(found), hours=found.hours, usd=found.usd, usd_per_hour=rate)
    worlds = plan.forecast.worlds if plan.forecast is not None else ()
    if not worlds or usd_per_hour is None:
        return None
    hours = worlds[-1].hours
    return ClusterCost(
        machines=f"all machines of '{spec.name}'",
        hours=hours,
        usd=hours.scaled(usd_per_hour),
        usd_per_hour=usd_per_hour,
    )


def cluster_offers(spec: CloudSpec, offers: Iterable[Offer]) -> list[Offer]:
    """Return the offers that a cluster file allows, at the prices that it states."""
    types, anywhere = workers_of(spec), spec.regions == ("auto",)
    found = [
        offer
        for offer in offers
        if offer.cloud == spec.provider
        and offer.instance in types
        and (anywhere or any(region.startswith(offer.region) for region in spec.regions))
    ]
    return [_at_stated_price(offer, spec) for offer in found]


def _at_stated_price(offer: Offer, spec: CloudSpec) -> Offer:
    stated = spec.usd_per_hour.get(offer.instance)
    if stated is None:
        return offer
    return replace(
        offer,
        usd_per_hour=None if spec.spot else stated,
        spot_usd_per_hour=stated if spec.spot else None,
    )


def _on_cloud(
    plan: DraftPlan, spec: CloudSpec, offers: Iterable[Offer], *, former: Iterable[FormerRun]
) -> Candidate | None:
    most = max(1, spec.workers.high)
    candidates, _ = find_candidates(plan, cluster_offers(spec, offers), former=tuple(former), max_machines=most)
    allowed = [one for one in candidates if one.is_spot == spec.spot]
    largest = max((one.world_size for one in allowed), default=0)
    return next((one for one in allowed if one.world_size == largest), None)
