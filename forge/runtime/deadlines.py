"""Watch the limits of time that a run has: `resources.deadline` and `resources.max_hours`.

From the plan and the recorded events, so that a resumed run and a restarted supervisor go on with the same limits
and do not repeat a forecast.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from forge.cluster.cloud.machine_limits import find_limits
from forge.cluster.cloud.other_regions import read_regions
from forge.elastic.deadline_watch import DeadlineTerms, DeadlineWatch
from forge.elastic.placement import Placement
from forge.elastic.region_watch import OtherRegion, RegionTerms, RegionWatch
from forge.events import Event
from forge.plan.move_costs import DEAREST_USD_PER_GIB, MOVE_S, move_costs
from forge.plan.plan import Plan
from forge.runs.records import EVENTS, RecordReader, seconds_run


def watch_deadlines(
    plan: Plan, *, folder: Path, placement: Placement, record_event: Callable[[Event], None]
) -> Iterator[DeadlineWatch]:
    """Watch the deadline of a run, for which machines are rented, and its hours, which only cause a warning.

    Args:
        folder: of the run.
    """
    resources, now, history = plan.job.resources, time.time(), folder / EVENTS
    if resources.deadline is not None:
        first, last = recorded_ends(history, "DeadlineForecast", limit="deadline")
        started_at = float(first["time"]) if first is not None else now
        deadline_at = resources.deadline.at_s(start=started_at)
        yield DeadlineWatch(
            _terms(plan, limit="deadline", started_at=started_at, deadline_at=deadline_at),
            placement=placement,
            record_event=record_event,
            machines=find_limits(folder.name, home=Path.home()),
            regions=_watch_regions(plan, history=history, record_event=record_event),
            was_met=_was_met(last),
        )
    if resources.max_hours is not None:
        _, last = recorded_ends(history, "DeadlineForecast", limit="max_hours")
        started_at = now - _seconds_run(folder)  # the time between sessions does not count
        deadline_at = started_at + resources.max_hours * 3600
        yield DeadlineWatch(
            _terms(plan, limit="max_hours", started_at=started_at, deadline_at=deadline_at),
            placement=placement,
            record_event=record_event,
            was_met=_was_met(last),
        )


def recorded_ends(
    history: Path, kind: str, *, limit: str | None = None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the first record of `events.jsonl`, and the last event of a kind.

    Args:
        limit: only events with this `limit`, which is `deadline` where none is recorded.
    """
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    with contextlib.suppress(OSError), history.open() as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                first = first or {"time": float(record["time"])}
                is_wanted = record["event"] == kind and limit in (None, record.get("limit", "deadline"))
                last = record if is_wanted else last
    return first, last


def _terms(
    plan: Plan, *, limit: Literal["deadline", "max_hours"], started_at: float, deadline_at: float
) -> DeadlineTerms:
    worlds = plan.forecast.worlds if plan.forecast is not None else ()
    world, steps_s = (worlds[-1], worlds[-1].step_s * plan.total_steps) if worlds else (None, 1.0)
    return DeadlineTerms(
        started_at=started_at,
        deadline_at=deadline_at,
        total_steps=plan.total_steps,
        max_workers=plan.job.resources.workers.high,
        step_worker_s=world.step_s * world.world_size if world is not None else None,
        overhead=1 + (world.evaluation_s + world.tasks_s + world.checkpoint_s) / steps_s
        if world is not None
        else 1.0,
        limit=limit,
    )


def _watch_regions(plan: Plan, *, history: Path, record_event: Callable[[Event], None]) -> RegionWatch | None:
    """Watch for reasons to move to another region; None where the cluster cannot move."""
    cloud, regions = os.environ.get("FORGE_CLOUD"), read_regions(os.environ)
    if cloud is None or regions is None:
        return None
    advised = _advised_moves(history)
    left = {str(one["here"]): float(one["time"]) for one in advised if one["here"] != regions.here}
    others = []
    for place in regions.others:
        costs = move_costs(plan, cloud=cloud, storage_region=regions.storage_region, to=place)
        others.append(
            OtherRegion(
                place=place,
                usd_per_hour=regions.spot_usd_per_hour[place],
                move_usd=costs.read_usd,
                assumed_usd=costs.checkpoint_gib * DEAREST_USD_PER_GIB,
                left_at=left.get(place),
            )
        )
    terms = RegionTerms(
        here=regions.here,
        usd_per_hour=regions.spot_usd_per_hour.get(regions.here),
        on_demand_usd_per_hour=regions.on_demand_usd_per_hour,
        others=others,
        move_s=MOVE_S,
        advised_at=max((float(one["time"]) for one in advised), default=-math.inf),
    )
    return RegionWatch(terms, record_event=record_event)


def _advised_moves(history: Path) -> list[dict[str, Any]]:
    """Return the recorded advices to move, in their order."""
    found = []
    with contextlib.suppress(OSError), history.open() as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["event"] == "RegionMoveAdvised" and isinstance(record["here"], str):
                    found.append(record | {"time": float(record["time"])})
    return found


def _was_met(forecast: Mapping[str, Any] | None) -> bool | None:
    """Whether a recorded `DeadlineForecast` met its deadline; None if there is none."""
    return None if forecast is None else (forecast["ends_at"] or math.inf) <= forecast["deadline"]


def _seconds_run(folder: Path) -> float:
    try:
        return seconds_run(RecordReader(folder, kind="event").read())
    except ValueError:  # unreadable: what was run before is unknown
        return 0.0
