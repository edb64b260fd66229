"""The head of a page about a search: its metric and searcher, and the numbers at the top."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from forge.report.page import STATUS_COLORS, PageTile
from forge.report.search_summary import SearchSummary
from forge.report.text import number
from forge.units import format_duration


def search_headline(summary: SearchSummary) -> str:
    """Describe the metric, the searcher and the scheduler in a few words."""
    search = summary.search
    words = [f"{search.metric}, {'less' if search.direction == 'min' else 'more'} is better"]
    words.append(f"searcher {search.searcher.kind}")
    words += [f"scheduler {search.scheduler.kind}"] if search.scheduler.kind != "none" else []
    words += ["trials of a proxy job"] if search.proxy else []
    return " · ".join(words)


def search_tiles(summary: SearchSummary) -> Iterator[PageTile]:
    """The numbers at the top of the page of a search."""
    trials, counts, best = list(summary.table.trials.values()), summary.table.counts(), summary.best
    progress = f"{len(trials)} of {summary.num_trials}" if len(trials) < summary.num_trials else f"{len(trials)}"
    by_status = ", ".join(f"{counts[status]} {status}" for status in STATUS_COLORS if status in counts)
    yield PageTile(name="trials", value=progress, note=by_status or "none yet")
    if best is not None:
        yield PageTile(
            name=f"best {summary.search.metric}", value=number(best.value, ".5g"), note=f"trial {best.number}"
        )
    plan = summary.run.plan.search
    at_once = f"{plan.trials_at_once} at once" if plan else ""
    yield PageTile(name="wall time", value=format_duration(summary.run.goodput().wall_s), note=at_once)
    starts = [trial.start_s for trial in trials if trial.start_s is not None]
    if starts:
        num_warm = sum(trial.is_warm for trial in trials if trial.start_s is not None)
        note = f"median; {num_warm} of {len(starts)} warm"
        yield PageTile(name="start of a trial", value=format_duration(statistics.median(starts)), note=note)
    cost = summary.run.newest("CostUpdated")
    if cost is not None:
        yield PageTile(name="cost", value=f"{number(cost.get('usd'), ',.2f')} USD", note="all machines together")
