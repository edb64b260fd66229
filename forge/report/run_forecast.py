"""The forecast of a plan beside what the run did."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forge.errors import PlanError
from forge.plan.durations import WorldHours
from forge.report.forecast_text import hours_text
from forge.report.text import number
from forge.runs.goodput_report import GoodputReport
from forge.runs.reader import RunSummary
from forge.units import format_bytes, format_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastRow:
    """One quantity of the forecast."""

    name: str
    forecast: str
    happened: str
    ratio: str
    """What happened ÷ the likely value."""


def forecast_rows(run: RunSummary, goodput: GoodputReport) -> tuple[list[ForecastRow], str]:
    """Compare the forecast at the run's largest world size with the run.

    Returns: the rows, and a sentence on what they are; no rows without a forecast or before the first generation.
    """
    sizes = [event["world_size"] for event in run.events if event["event"] == "GenerationStarted"]
    size = max(sizes, default=0)
    rows = [*_time_rows(run, goodput, size), *_cost_row(run), *_memory_row(run, size)]
    lost_s = sum(goodput.seconds[bucket] for bucket in ("repeated", "stalled", "waiting"))
    words = [f"at {size:,} workers, the most that the run had"]
    if (world := _world_hours(run, size)) is not None and world.world_size != size:
        words.append(f"the forecast of times is of {world.world_size:,} workers, the nearest that the plan lists")
    if run.status == "running" or run.step < run.plan.total_steps:
        words.append("the run has not reached its last step")
    words.append(f"repeated steps, hangs and waiting for machines ({format_duration(lost_s)}) are in no forecast")
    return rows, "; ".join(words)


def _world_hours(run: RunSummary, size: int) -> WorldHours | None:
    """The forecast at the nearest size that the plan lists; None if there is none or the job forbids `size`."""
    worlds = run.plan.forecast.worlds if run.plan.forecast is not None else ()
    workers = run.plan.job.resources.workers
    if not workers.low <= size <= workers.high:
        return None
    return min(worlds, key=lambda world: abs(world.world_size - size), default=None)


def _time_rows(run: RunSummary, goodput: GoodputReport, size: int) -> list[ForecastRow]:
    world = _world_hours(run, size)
    if world is None:
        return []
    seconds = goodput.seconds
    hours_s = 3600 * world.hours.likely
    return [
        _row("wall time", hours_s, goodput.wall_s, forecast=hours_text(world)),
        _row("a step", world.step_s, goodput.ideal_step_s),
        _row("starts", world.startup_s, seconds["starting"]),
        _row("evaluations", world.evaluation_s + world.tasks_s, seconds["evaluating"]),
        _row("checkpoints", world.checkpoint_s, seconds["saving"]),
    ]


def _cost_row(run: RunSummary) -> list[ForecastRow]:
    cost = run.plan.forecast.cost if run.plan.forecast is not None else None
    happened = run.newest("CostUpdated")
    if cost is None or not happened:
        return []
    low, likely, high = (f"{usd:,.2f}" for usd in (cost.usd.low, cost.usd.likely, cost.usd.high))
    return [
        ForecastRow(
            name="USD",
            forecast=f"{likely} ({low} to {high}) on {cost.machines}",
            happened=f"{happened['usd']:,.2f}",
            ratio=number(happened["usd"] / cost.usd.likely if cost.usd.likely else math.nan, ".2f"),
        )
    ]


def _memory_row(run: RunSummary, size: int) -> list[ForecastRow]:
    peak_gib = run.last.get("memory/peak_gib")
    try:
        need = run.plan.for_world_size(size).memory
    except PlanError:  # no generation has started, or the limits were changed since
        return []
    if not peak_gib:
        return []
    expected, happened = need.total_bytes - need.standby_bytes, peak_gib * 2**30  # that of torch's allocator
    ratio = number(happened / expected if expected else math.nan, ".2f")
    return [
        ForecastRow(
            name="memory of a worker", forecast=format_bytes(expected), happened=format_bytes(happened), ratio=ratio
        )
    ]


def _row(name: str, likely_s: float, happened_s: float, *, forecast: str = "") -> ForecastRow:
    ratio = happened_s / likely_s if likely_s else math.nan
    return ForecastRow(
        name=name,
        forecast=forecast or format_duration(likely_s),
        happened=format_duration(happened_s),
        ratio=number(ratio, ".2f"),
    )
