"""Whether a job can be done by `resources.deadline`, before it starts: its forecast against the time until then."""

from __future__ import annotations

from dataclasses import dataclass

from forge.plan.durations import WorldHours
from forge.plan.plan import DraftPlan
from forge.units import format_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineOutlook:
    """What the forecast says about a deadline."""

    left_s: float
    """From now, which counts as the start of the run; negative if the deadline has passed."""
    fewest: WorldHours | None
    """The fewest workers that likely meet it; None if no number of workers does."""
    fastest: WorldHours

    @property
    def is_impossible(self) -> bool:
        """Whether even the shortest forecast is too long."""
        return 3600 * self.fastest.hours.low > self.left_s


def deadline_outlook(plan: DraftPlan, *, now: float) -> DeadlineOutlook | None:
    """Compare the forecast with the deadline; None without a deadline or a forecast.

    Args:
        now: seconds since the epoch.
    """
    deadline, worlds = plan.job.resources.deadline, plan.forecast.worlds if plan.forecast is not None else ()
    if deadline is None or not worlds:
        return None
    left_s = deadline.at_s(start=now) - now
    return DeadlineOutlook(
        left_s=left_s,
        fewest=next((world for world in worlds if 3600 * world.hours.likely <= left_s), None),
        fastest=min(worlds, key=lambda world: world.hours.likely),
    )


def deadline_warning(plan: DraftPlan, *, now: float) -> str | None:
    """Say that the deadline is missed according to the forecast, and what would be possible; None if it is met."""
    found = deadline_outlook(plan, now=now)
    if found is None or found.fewest is not None:
        return None
    fastest = found.fastest
    takes = format_duration(3600 * fastest.hours.likely)
    high = format_duration(3600 * fastest.hours.high)
    if found.left_s <= 0:
        what = f"has passed {format_duration(-found.left_s)} ago"
    else:
        what = f"cannot be met in the {format_duration(found.left_s)} that are left"
        what = what if found.is_impossible else what.replace("cannot be met", "is likely missed")
    possible = f"a deadline after {takes} to {high}"
    if found.left_s > 0:
        count = -(-fastest.world_size * fastest.hours.likely * 3600 // found.left_s)
        possible = f"about {count:,.0f} workers of this kind, or {possible}"
    return (
        f"resources.deadline: {plan.job.resources.deadline} {what}: with {fastest.world_size} "
        f"worker{'s' * (fastest.world_size != 1)} the run likely takes {takes}. Possible: {possible}"
    )
