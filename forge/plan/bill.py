"""The bill of a job before it starts: hours and USD on each candidate, and which to choose.

The frontier are the candidates that no other beats in both hours and USD; what saves less than 1 % of the hours
counts as equally fast. Limits are compared with likely values, whose ranges are shown.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from forge.config.cluster import CloudSpec
from forge.config.resources import ResourcesSpec
from forge.plan.candidates import Candidate, LeftOut, describe, find_candidates
from forge.plan.forecast import FormerRun
from forge.plan.interruptions import ASSUMED_BASIS, Interruptions
from forge.plan.machines import ASSUMED_INTER_NODE_GBPS, MAX_MACHINES
from forge.plan.move_costs import moving_note
from forge.plan.plan import DraftPlan
from forge.plan.recovery import BOOT_S
from forge.pricing.choose import OfferFilter, cluster_offers, matching_offers
from forge.pricing.offer import Offer
from forge.pricing.offers import OfferTable
from forge.units import format_duration

_AS_FAST = 1.01
"""Candidates are equally fast if their hours differ by less than this factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BillChoice:
    """A candidate that answers a question."""

    question: str
    """`cheapest within 24 h`, `fastest for at most 100 USD`."""
    candidate: Candidate | None
    problem: str | None = None
    """Why there is none, and what would be possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BillScope:
    """Which machines are asked for, beside what the job says."""

    wanted: OfferFilter | None = None
    """GPU and region."""
    is_spot: bool | None = None
    """None: spot and on demand."""
    cluster: CloudSpec | None = None
    """Only machines that this file allows, at the prices that it states."""

    @property
    def max_machines(self) -> int:
        """The most machines in one candidate."""
        return MAX_MACHINES if self.cluster is None else max(1, self.cluster.workers.high)

    def offers(self, offers: Sequence[Offer]) -> Sequence[Offer]:
        """The offers asked for. Raises: ArgumentError if there are none of the GPU or in the region."""
        if self.cluster is not None:
            offers = cluster_offers(self.cluster, offers)
        return offers if self.wanted is None else matching_offers(offers, wanted=self.wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What a job costs on rented machines."""

    candidates: tuple[Candidate, ...]
    """The cheapest first."""
    left_out: tuple[LeftOut, ...]
    max_hours: float | None
    max_usd: float | None
    notes: tuple[str, ...]
    """Age of the prices, and what is assumed."""

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """The candidates that no other beats in both hours and USD, the cheapest first."""
        return frontier(self.candidates)

    @property
    def choices(self) -> tuple[BillChoice, ...]:
        """The cheapest within the limit of hours, and the fastest within that of USD."""
        return choices(self)


def make_bill(
    plan: DraftPlan,
    table: OfferTable,
    *,
    former: Sequence[FormerRun] = (),
    trace: Interruptions | None = None,
    scope: BillScope | None = None,
) -> Bill:
    """Return the bill of a job.

    Args:
        former: measured runs, the newest first.
        trace: interruptions of spot machines, instead of those that the offers name.
        scope: leave out other machines, without counting them.

    Raises: ArgumentError for a GPU or a region that no offer has.
    """
    scope = scope or BillScope()
    candidates, left_out = find_candidates(
        plan,
        scope.offers(table.offers),
        former=former,
        trace=trace,
        max_machines=scope.max_machines,
        kinds=(False, True) if scope.is_spot is None else (scope.is_spot,),
        storage=table.storage,
    )
    resources, spec = plan.job.resources, scope.cluster
    moving = None if spec is None else moving_note(plan, spec, regions=(one.offer.region for one in candidates))
    return Bill(
        candidates=candidates,
        left_out=left_out,
        max_hours=_max_hours(resources),
        max_usd=resources.max_usd,
        notes=(*table.notes, *_assumptions(candidates, trace=trace), *([moving] if moving else [])),
    )


def _max_hours(resources: ResourcesSpec) -> float | None:
    """The limit of hours: `max_hours`, and the deadline of a run that starts now."""
    now, deadline = time.time(), resources.deadline
    left = None if deadline is None else max(0.0, deadline.at_s(start=now) - now) / 3600
    return min((limit for limit in (resources.max_hours, left) if limit is not None), default=None)


def is_priced(plan: DraftPlan) -> bool:
    """Whether a job can use rented GPUs; `resources.gpu: none` asks for CPUs."""
    return plan.job.resources.gpu != "none"


def frontier(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates that no other beats in both hours and USD.

    Args:
        candidates: the cheapest first.
    """
    found: list[Candidate] = []
    for one in candidates:
        if not found or one.hours.likely * _AS_FAST < found[-1].hours.likely:
            found.append(one)
    return tuple(found)


def choices(bill: Bill) -> tuple[BillChoice, ...]:
    """Answer what is cheapest within the limit of hours, and fastest within that of USD."""
    if not bill.candidates:
        return ()
    in_time = [one for one in bill.candidates if bill.max_hours is None or one.hours.likely <= bill.max_hours]
    in_budget = [one for one in bill.candidates if bill.max_usd is None or one.usd.likely <= bill.max_usd]
    cheapest = BillChoice(
        question="cheapest" if bill.max_hours is None else f"cheapest within {_hours(bill.max_hours)}",
        candidate=in_time[0] if in_time else None,
        problem=None if in_time else _too_slow(bill),
    )
    fastest = BillChoice(
        question="fastest" if bill.max_usd is None else f"fastest for at most {_usd(bill.max_usd)}",
        candidate=_fastest(in_budget) if in_budget else None,
        problem=None if in_budget else _too_expensive(bill),
    )
    return cheapest, fastest


def _fastest(candidates: Sequence[Candidate]) -> Candidate:
    """The cheapest of the fastest."""
    least = min(one.hours.likely for one in candidates)
    return next(one for one in candidates if one.hours.likely <= _AS_FAST * least)


def _too_slow(bill: Bill) -> str:
    best = _fastest(bill.candidates)
    limit = _hours(bill.max_hours or 0.0)
    return f"no candidate is likely to take at most {limit}; the fastest takes {_amounts(best)}: {describe(best)}"


def _too_expensive(bill: Bill) -> str:
    best = bill.candidates[0]
    return (
        f"no candidate is likely to cost at most {_usd(bill.max_usd or 0.0)}; the cheapest takes {_amounts(best)}: "
        f"{describe(best)}"
    )


def _amounts(one: Candidate) -> str:
    return f"{_hours(one.hours.likely)} and {_usd(one.usd.likely)}"


def _hours(value: float) -> str:
    text = f"{value:,.2f}".rstrip("0").rstrip(".")
    return f"{text} h" if value >= 0.1 else format_duration(3600 * value)


def _usd(value: float) -> str:
    return f"{value:,.2f} USD" if value >= 0.01 else f"{value:.2g} USD"


def _assumptions(candidates: Sequence[Candidate], *, trace: Interruptions | None) -> list[str]:
    boot = BOOT_S
    notes = [
        f"assumed: machines start in {boot.likely / 60:.0f} minutes ({boot.low / 60:.0f} to {boot.high / 60:.0f}); "
        "spot machines are to be had, and a lost one is replaced in that time"
    ]
    spot = [one for one in candidates if one.is_spot]
    if trace is not None:
        rate = trace.per_machine_hour.likely
        notes.append(
            f"interruptions by {trace.basis}: {rate:.3g} in an hour of a machine, {trace.available:.0%} of the "
            "machines available"
        )
    elif any(one.offer.interruption is None for one in spot):
        clouds = sorted({one.offer.cloud for one in spot if one.offer.interruption is None})
        notes.append(f"{', '.join(clouds)}: interruptions are not published for all machines; {ASSUMED_BASIS}")
    if any(one.offer.inter_node_gbps is None and one.num_machines > 1 for one in candidates):
        notes.append(f"assumed: {ASSUMED_INTER_NODE_GBPS:.0f} Gbit/s between machines whose network is unknown")
    if candidates:
        notes.append("not counted: tax, discounts, and machines that stay up after the run")
    return notes
