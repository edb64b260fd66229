"""Advises to move a run to another region of its cluster file when spot machines stay away where it is.

A cluster has one region, so a run moves as a whole: it stops with a checkpoint, and the client, which alone may
rent machines elsewhere, ends the cluster and starts it in another region (`forge cluster move`). What other
regions have is known only by renting there. So a move is considered when spot machines have been missing for as
long as a move takes, which costs at most twice what waiting or moving at once would have (the ski rental rule;
Karlin et al., Algorithmica 3, 1988), and a region that the run has left counts as empty for two hours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from forge.events import Event, RegionMoveAdvised
from forge.plan.deadline import RegionOffer, Situation, decide

_EMPTY_S = 7200.0
"""Bamboo's and Parcae's traces have few outages that are longer."""
_REPEAT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherRegion:
    """A region to which a run may move."""

    place: str
    usd_per_hour: float
    """Of a spot machine, on the day on which the cluster started."""
    move_usd: float | None
    """Traffic of the run's checkpoint; None: unknown."""
    assumed_usd: float
    """What decides where `move_usd` is unknown: never zero."""
    left_at: float | None = None
    """When the run moved away, in seconds since the epoch; None if it was never there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionTerms:
    """Where a run is and where it may be."""

    here: str
    usd_per_hour: float | None
    """Of a spot machine here; None: unknown."""
    on_demand_usd_per_hour: float | None
    others: Sequence[OtherRegion]
    move_s: float
    """Pause of a move, without the start of the machines."""
    advised_at: float = -math.inf
    """When the last move was advised, in seconds since the epoch."""


class RegionWatch:
    """Advises at most once an hour to move a run."""

    def __init__(self, terms: RegionTerms, *, record_event: Callable[[Event], None]) -> None:
        self.terms = terms
        self._record_event = record_event
        self._advised_at = terms.advised_at

    def check(self, situation: Situation, *, now: float, missing_s: float) -> None:
        """Record the event `RegionMoveAdvised` if the run should move.

        Args:
            situation: as if all machines were available here.
            now: seconds since the epoch.
            missing_s: how long spot machines have been missing; 0 if none is.
        """
        terms = self.terms
        if missing_s < terms.move_s + situation.start_s or now - self._advised_at < _REPEAT_S:
            return
        here = replace(situation.regions[0], num_available=situation.num_spot)
        offers = [here, *(self._offer(one, situation, now=now) for one in terms.others)]
        choice = decide("elastic", replace(situation, regions=offers, region=0, move_s=terms.move_s))
        if choice.region == 0:
            return
        self._advised_at = now
        other = terms.others[choice.region - 1]
        self._record_event(
            RegionMoveAdvised(
                here=terms.here,
                to=other.place,
                num_spot=situation.num_spot,
                num_wanted=situation.num_nodes,
                missing_s=missing_s,
                slack_s=situation.slack_s,
                pause_s=terms.move_s,
                usd_per_hour=other.usd_per_hour,
                move_usd=other.move_usd,
            )
        )

    def _offer(self, one: OtherRegion, situation: Situation, *, now: float) -> RegionOffer:
        is_empty = one.left_at is not None and now - one.left_at < _EMPTY_S
        return RegionOffer(
            num_available=0 if is_empty else situation.num_nodes,
            usd_per_hour=one.usd_per_hour,
            move_usd=one.assumed_usd if one.move_usd is None else one.move_usd,
        )
