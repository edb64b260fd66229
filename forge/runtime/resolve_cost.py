"""Add to a plan what the run costs: on a cluster, or on this machine if it is rented."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from forge.config.cluster import CloudSpec, ClusterSpec, LocalSpec
from forge.errors import ArgumentError, ClusterError
from forge.plan.cluster_bill import cluster_cost
from forge.plan.plan import DraftPlan
from forge.pricing.budget import read_price
from forge.pricing.offers import OfferTable, load_offers
from forge.runs.former_runs import former_runs

_PlanT = TypeVar("_PlanT", bound=DraftPlan)


def with_cost(plan: _PlanT, spec: ClusterSpec | None, *, usd_per_hour: float | None) -> _PlanT:
    """Add what a run or a search costs on a cluster, if that is known.

    Args:
        spec: the cluster file; None if the cluster is unknown.
        usd_per_hour: the most that the cluster costs.
    """
    if spec is None or plan.forecast is None:
        return plan
    former = former_runs(Path(plan.job.checkpoint.runs), hardware=plan.hardware)
    table = load_offers() if isinstance(spec, CloudSpec) else OfferTable(offers=())
    cost = cluster_cost(plan, spec, table, usd_per_hour=usd_per_hour, former=former)
    return replace(plan, forecast=replace(plan.forecast, cost=cost))


def with_own_cost(plan: _PlanT) -> _PlanT:
    """Add what a run costs on this machine, if its environment has a price.

    Raises: ArgumentError if that is no price.
    """
    try:
        price = read_price(os.environ)
    except ClusterError as error:  # of this machine's environment, which its user sets
        raise ArgumentError(str(error)) from None
    return plan if price is None else with_cost(plan, LocalSpec(name="local", provider="local"), usd_per_hour=price)
