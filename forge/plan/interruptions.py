"""How often a spot machine is interrupted, as a rate: from a cloud's monthly band, from a trace, or assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forge.plan.throughput import Estimate
from forge.pricing.offer import InterruptionBand, Offer

HOURS_PER_MONTH = 730.5
_HIGHEST_PER_HOUR = 0.61
"""Of one machine: the worst that is known of a day and a cloud.

Source: 167 losses in 273 machine-hours of Bamboo's trace of p3 machines on EC2 (Thorpe et al., NSDI 2023)."""
_ASSUMED = Estimate(low=0.05, likely=0.10, high=0.15)
"""Share of spot machines that are interrupted in a day, where the cloud publishes none for the machine.

Source: "between 5 % and 15 % per day per project", Google Cloud's documentation of preemptible machines, 2020."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruptions:
    """How often a machine is lost, and how many there are."""

    per_machine_hour: Estimate
    """Losses in an hour of one rented machine."""
    available: float = 1.0
    """Mean share of the machines asked for that are there."""
    basis: str
    """Where the rate comes from."""


def _rate(share: float, *, hours: float) -> float:
    """Return the rate p = 1 - e^(-rate · hours) of a share p."""
    return min(_HIGHEST_PER_HOUR, -math.log1p(-share) / hours) if share < 1 else _HIGHEST_PER_HOUR


NONE = Interruptions(per_machine_hour=Estimate(low=0.0, likely=0.0, high=0.0), basis="on demand")
ASSUMED_BASIS = "5 to 15% of the machines a day are assumed, as Google once observed"

ASSUMED = Interruptions(
    per_machine_hour=Estimate(
        low=_rate(_ASSUMED.low, hours=24.0),
        likely=_rate(_ASSUMED.likely, hours=24.0),
        high=_rate(_ASSUMED.high, hours=24.0),
    ),
    basis=ASSUMED_BASIS,
)


def interruptions_of(offer: Offer) -> Interruptions:
    """Return how often spot machines of an offer are interrupted."""
    if offer.interruption is not None:
        return Interruptions(per_machine_hour=rate_of_band(offer.interruption), basis="AWS Spot Advisor")
    return ASSUMED


def rate_of_band(band: InterruptionBand) -> Estimate:
    """Return the rate at which a share of `band` is interrupted in a month: p = 1 - e^(-rate · month).

    The likely rate is that of the middle of the band. All machines in a month (the band above 20 %) would be an
    infinite rate; the highest that was observed takes its place.
    """
    middle = (band.low + band.high) / 2
    low, likely, high = (_rate(share, hours=HOURS_PER_MONTH) for share in (band.low, middle, band.high))
    return Estimate(low=low, likely=likely, high=high)
