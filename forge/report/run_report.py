"""Write `report.html` of a run: what it reached, where its time and money went, and how to repeat it.

Reads only the run's folder, whether the run is running or not, and reads `metrics.jsonl` twice, record by record,
so a report of a million steps takes little memory. `forge.report.page` says why the page loads and executes nothing
of the folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, harmless
from forge.fs import write_atomic
from forge.process import first_line
from forge.report.alert_rows import ALERT_COLUMNS, AlertTable
from forge.report.alerts_text import alert_facts
from forge.report.page import PageFigure, PageTile, render_page
from forge.report.run_environment import environment_facts, repeat_lines
from forge.report.run_figures import cost_figure, loss_figure, speed_figure, workers_figure
from forge.report.run_forecast import forecast_rows
from forge.report.run_scores import score_rows
from forge.report.run_series import RunSeries, read_series
from forge.report.text import change_rows, goodput_facts, headline, number, plan_facts, summary_facts
from forge.report.time_limits import late_texts
from forge.runs.annotations import read_annotations
from forge.runs.goodput_report import BUCKETS, Bucket, GoodputReport
from forge.runs.reader import RunSummary, failure_of, iter_metrics, read_plan, read_run
from forge.runs.records import METRICS
from forge.runs.scores import newest_scores, read_scores
from forge.units import counted, format_bytes, format_count, format_duration

REPORT = "report.html"
"""In the run's folder."""
_MAX_CHANGES = 100
MAX_ALERTS = 100
_MAX_BYTES_AT_END = 2**26
"""Of `metrics.jsonl`, about 200,000 steps: reading more would keep the process of a run alive for seconds."""
BUCKET_COLORS: dict[Bucket, str] = {
    "training": "#1d9a6c",
    "repeated": "#cf3e3e",
    "evaluating": "#2f6bd8",
    "saving": "#0e95a8",
    "sampling": "#7aa2e8",
    "stalled": "#8a4fbf",
    "starting": "#c08a1e",
    "waiting": "#e2571b",
    "other": "#8b95a3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketShare:
    """One part of the goodput bar."""

    name: str
    color: str
    seconds: float
    share: float


def write_run_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a run that is not a search.

    Returns: the page.
    Raises: ArgumentError if the folder holds no readable run, or cannot be written; PlanError if its plan cannot be
        read.
    """
    path = folder / REPORT
    page = render_run(read_run(folder))
    try:
        write_atomic(path, page)
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def write_end_report(folder: Path) -> str | None:
    """Write the report of a run that has ended, whatever state its folder is in.

    Returns: why it was not written, for the log; None if it was.
    """
    try:
        size_bytes = (folder / METRICS).stat().st_size if (folder / METRICS).exists() else 0
        if size_bytes > _MAX_BYTES_AT_END:
            return (
                f"no report was written: {METRICS} has {format_bytes(size_bytes)}; forge runs report {folder.name}"
            )
        if read_plan(folder).search is None:  # the report of a search is written by its client
            write_run_report(folder)
    except Exception as error:  # the run has ended as recorded
        return f"no report was written: {type(error).__name__}: {first_line(error)}"
    return None


def render_run(run: RunSummary) -> str:
    """Return the page of a run."""
    goodput, annotations = run.goodput(), read_annotations(run.folder)
    figures = list(run_figures(run, goodput, series=read_series(iter_metrics(run.folder))))
    sample = run.newest("SampleGenerated")
    forecast, forecast_note = forecast_rows(run, goodput)
    return render_page(
        "run.html.j2",
        run=run,
        is_running=run.status == "running",
        status="finished early" if run.is_stopped_early else run.status,
        headline=headline(run.plan),
        tags=annotations.tags,
        note=annotations.note,
        failure=failure_of(run),
        tiles=list(run_tiles(run, goodput)),
        figures=figures,
        buckets=bucket_shares(goodput),
        goodput=goodput_facts(goodput),
        changes=change_rows(goodput, limit=_MAX_CHANGES),
        num_changes=goodput.num_changes,
        alerts=alert_context(run),
        costs=cost_facts(run),
        forecast=forecast,
        forecast_note=forecast_note,
        scores=score_rows(newest_scores(read_scores(run.folder))),
        results=[fact for fact in summary_facts(run, goodput) if not fact[0].startswith("task ")],
        plan=plan_facts(run.plan),
        warnings=[*late_texts(run).values(), *run.plan.warnings],
        environment=environment_facts(run),
        repeat="\n".join(harmless(line) for line in repeat_lines(run)),
        sample=sample,
    )


def run_figures(run: RunSummary, goodput: GoodputReport, *, series: RunSeries) -> Iterator[PageFigure]:
    """Draw loss, throughput, world size and cost."""
    yield loss_figure(series, goodput.changes)
    yield speed_figure(series, goodput.changes, since=run.started)
    ends = [record["time"] for record in (*run.events[-1:], run.last) if record]
    until = time.time() if run.status == "running" else max([run.started, *ends])
    yield workers_figure(run.events, since=run.started, until=until)
    yield cost_figure(run.events, since=run.started)


def alert_context(run: RunSummary) -> dict[str, Any] | None:
    """Return what the page says about the alerts of a run; None if its job has none and none were sent."""
    table = AlertTable(run.events, run_id=run.run_id)
    settings = alert_facts(run.plan)
    if not settings and not table.num_alerts:
        return None
    rows = list(table.rows(limit=MAX_ALERTS).values())
    return {"columns": ALERT_COLUMNS, "rows": rows, "count": table.num_alerts, "settings": dict(settings)}


def run_tiles(run: RunSummary, goodput: GoodputReport) -> Iterator[PageTile]:
    """The numbers at the top of the page."""
    total, last = run.plan.total_steps, run.last
    done = f"{run.step / max(1, total):.0%}"
    tokens = last.get("train/tokens")
    yield PageTile(
        name="step",
        value=f"{run.step:,} of {total:,}",
        note=done if tokens is None else f"{done}, {format_count(tokens)} tokens",
    )
    evaluated = run.newest("Evaluated", weights="current")
    held_out = f"held out {number(evaluated['loss'], '.4f')}" if evaluated else "not evaluated"
    yield PageTile(name="loss", value=number(last.get("train/loss"), ".4f"), note=held_out)
    mfu = f"MFU {number(goodput.mfu, '.1%')}, " if goodput.mfu == goodput.mfu else ""
    yield PageTile(name="tokens/s", value=number(goodput.tokens_per_s, ",.0f"), note=f"{mfu}mean of new steps")
    sessions = f"in {goodput.num_sessions} sessions" if goodput.num_sessions > 1 else "in 1 session"
    yield PageTile(name="wall time", value=format_duration(goodput.wall_s), note=sessions)
    node = number(goodput.node_goodput, ".1%")
    yield PageTile(name="goodput", value=number(goodput.goodput, ".1%"), note=f"{node} of the node time")
    yield PageTile(
        name="changes", value=f"{goodput.num_changes:,}", note=counted(goodput.num_preemptions, "preemption")
    )
    cost = run.newest("CostUpdated")
    if cost is not None:
        rate = f"{number(cost['usd_per_hour'], ',.2f')} USD per hour"
        yield PageTile(name="cost", value=f"{number(cost['usd'], ',.2f')} USD", note=rate)


def bucket_shares(goodput: GoodputReport) -> list[BucketShare]:
    """The buckets with time in them, in their order."""
    return [
        BucketShare(
            name=bucket,
            color=BUCKET_COLORS[bucket],
            seconds=goodput.seconds[bucket],
            share=goodput.share(bucket),
        )
        for bucket in BUCKETS
        if goodput.seconds[bucket] > 0
    ]


def cost_facts(run: RunSummary) -> list[tuple[str, str]]:
    """Describe what a run has cost; empty if its machines state no price."""
    cost = run.newest("CostUpdated")
    if cost is None or cost["usd"] is None:
        return []
    facts = [("so far", f"{cost['usd']:,.2f} USD, of all machines and restarts together")]
    if cost["saved_usd"]:
        on_demand = cost["usd"] + cost["saved_usd"]
        facts.append(
            (
                "on demand",
                f"{on_demand:,.2f} USD for the same hours, of which {cost['saved_usd'] / on_demand:.0%} was saved",
            )
        )
    tokens, limit = run.last.get("train/tokens"), run.plan.job.resources.max_usd
    if tokens:
        facts.append(("per token", f"{cost['usd'] / tokens * 1e6:,.4g} USD per million training tokens"))
    if limit is not None:
        facts.append(("limit", f"{limit:,.2f} USD (resources.max_usd), {cost['usd'] / limit:.0%} of it used"))
    return facts
