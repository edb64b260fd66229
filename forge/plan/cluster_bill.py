"""What a job costs on one cluster: on the machines that its file allows, or by the price that its file states."""

from __future__ import annotations

import math
from collections.abc import Iterable

from forge.config.cluster import CloudSpec, ClusterSpec, LocalSpec
from forge.plan.candidates import Candidate, describe, find_candidates
from forge.plan.durations import ClusterCost
from forge.plan.forecast import FormerRun
from forge.plan.plan import DraftPlan
from forge.pricing.catalog import head_price
from forge.pricing.choose import cluster_offers
from forge.pricing.offers import OfferTable


def cluster_cost(
    plan: DraftPlan,
    spec: ClusterSpec,
    table: OfferTable,
    *,
    usd_per_hour: float | None,
    former: Iterable[FormerRun] = (),
) -> ClusterCost | None:
    """Return what a job costs on a cluster; None if its price or the job's duration is unknown.

    Of a rented cluster with GPUs: on the cheapest of the machines that its file allows, as many as the file and the
    job allow. Of other machines, and for a search: the hours at the largest number of workers, at the price of all
    machines.

    Args:
        usd_per_hour: the most that the cluster costs; None if unknown.
        former: measured runs, the newest first.
    """
    if isinstance(spec, CloudSpec) and spec.gpu != "none" and plan.search is None:
        found = _on_cloud(plan, spec, table, former=former)
        if found is not None:
            rate = found.usd_per_hour if usd_per_hour is None else usd_per_hour
            return ClusterCost(machines=describe(found), hours=found.hours, usd=found.usd, usd_per_hour=rate)
    worlds = plan.forecast.worlds if plan.forecast is not None else ()
    if not worlds or usd_per_hour is None:
        return None
    hours = worlds[-1].hours
    machines = "this machine" if isinstance(spec, LocalSpec) else f"all machines of '{spec.name}'"
    if plan.search is not None:
        hours = hours.scaled(math.ceil(plan.search.num_trials / plan.search.trials_at_once))
        machines += f" for {plan.search.num_trials} trials, if none is stopped early"
    return ClusterCost(
        machines=machines,
        hours=hours,
        usd=hours.scaled(usd_per_hour),
        usd_per_hour=usd_per_hour,
    )


def _on_cloud(
    plan: DraftPlan, spec: CloudSpec, table: OfferTable, *, former: Iterable[FormerRun]
) -> Candidate | None:
    candidates, _ = find_candidates(
        plan,
        cluster_offers(spec, table.offers),
        former=tuple(former),
        max_machines=max(1, spec.workers.high),
        kinds=(spec.spot,),
        storage=table.storage,
    )
    limit, head = spec.max_usd_per_hour, head_price(spec.provider) or 0.0
    allowed = [one for one in candidates if limit is None or one.usd_per_hour + head <= limit]
    largest = max((one.world_size for one in allowed), default=0)
    return next((one for one in allowed if one.world_size == largest), None)
