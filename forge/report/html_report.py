"""A search on one page, `report.html`: what it found, how it went, and every trial.

Read from the search's folder alone, at any time. The page stands for itself: its styles, its figures and what draws
them lie inside it, and it forbids itself to ask anybody for anything. What the job or an event says is escaped.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from forge.config.overrides import search_of
from forge.config.search import SearchSpec
from forge.report.figures import (
    STATUS_COLORS,
    best_so_far,
    importance_bars,
    learning_curves,
    names_on_axis,
    parallel_coordinates,
    script,
    searched_keys,
)
from forge.report.text import number
from forge.report.trial_rows import shown
from forge.runs.reader import RunSummary, failure_of, read_run
from forge.runs.trials import Trial, TrialTable
from forge.search.importance import importances
from forge.units import format_duration

PAGE = "report.html"
"""In the search's folder."""

# The figures' script builds its shaders' code at run time, which needs unsafe-eval; nothing may be loaded.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
)
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f9; color: #1c2430; line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 20px 56px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0; }
.soft { color: #647082; font-size: 13.5px; }
.head { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin-bottom: 4px; }
.pill { display: inline-block; padding: 1px 10px; border-radius: 99px; font-size: 12.5px; font-weight: 600;
  white-space: nowrap; color: var(--c); background: color-mix(in srgb, var(--c) 12%, white); }
.card { background: white; border: 1px solid #e3e7ed; border-radius: 12px; padding: 18px 20px; margin-top: 16px;
  min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 16px; margin-top: 22px; }
.tiles .card { margin: 0; padding: 14px 18px; }
.tiles b { display: block; font-size: 22px; letter-spacing: -0.01em; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 16px; }
@media (max-width: 900px) { .pair { grid-template-columns: 1fr; } }
.best { border-left: 4px solid #e2571b; }
.values { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 12px 0 0; }
.values div { min-width: 0; }
dt { color: #647082; font-size: 13px; overflow-wrap: anywhere; }
dd { margin: 0; font-size: 18px; font-weight: 600; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 10px -20px -18px; padding: 0 20px 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #647082; font-weight: 600; font-size: 12.5px; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid #edf0f4; white-space: nowrap; }
td.text { white-space: normal; min-width: 140px; max-width: 340px; overflow-wrap: anywhere; }
.number { text-align: right; }
tr:last-child td { border-bottom: 0; }
tr.chosen td { background: #fdf1ec; }
tr.chosen td:first-child { box-shadow: -8px 0 0 #fdf1ec; font-weight: 700; }
footer { margin-top: 22px; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """What the page is made of."""

    run: RunSummary
    spec: SearchSpec
    book: TrialTable
    best: Trial | None


def write_page(folder: Path) -> Path:
    """Write `report.html` into the folder of a search, whether it is over or not; there is never half a page.

    Returns: the page.
    Raises: ArgumentError or PlanError if the folder holds no run that can be read; JobFileError if it is no search.
    """
    run = read_run(folder)
    spec, book = search_of(run.plan.job), TrialTable(run.events)
    search = _Search(run=run, spec=spec, book=book, best=book.best(spec.mode))
    path = folder / PAGE
    draft = folder / f"{PAGE}.draft"
    draft.write_text(_page(search), encoding="utf-8")
    draft.replace(path)
    return path


def wall_seconds(run: RunSummary) -> float:
    """From a search's first word to its last, until now if it goes on."""
    if run.status == "running":
        return time.time() - run.started
    return float(run.events[-1]["time"]) - run.started if run.events else 0.0


def _page(search: _Search) -> str:
    figures = _figures(search)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(search.run.run_id)}</title>",
            f"<style>{_STYLE}</style>",
            script() if "plotly-graph-div" in figures else "",
            "</head><body><main>",
            _head(search),
            _tiles(search),
            _best(search),
            figures,
            _table(search),
            f'<footer class="soft">Written by forge on {time.strftime("%Y-%m-%d at %H:%M UTC", time.gmtime())}'
            f"{', while the search went on' if search.run.status == 'running' else ''}.</footer>",
            "</main></body></html>\n",
        ]
    )


def _head(search: _Search) -> str:
    spec, run = search.spec, search.run
    words = [
        f"{spec.metric}, {'less' if spec.mode == 'min' else 'more'} is better",
        f"searcher {spec.searcher.kind}",
    ]
    words += [f"scheduler {spec.scheduler.kind}"] if spec.scheduler.kind != "none" else []
    words += ["trials of a proxy"] if spec.proxy else []
    failure = failure_of(run)
    return (
        f'<div class="head"><h1>{escape(run.run_id)}</h1>{_pill(run.status)}</div>'
        f'<p class="soft">{escape(" · ".join(words))}</p>'
        + (f'<p class="card">{escape(str(failure))}</p>' if failure else "")
    )


def _tiles(search: _Search) -> str:
    counts, plan = search.book.counts(), search.run.plan.search
    begun = sum(counts.values())
    planned = max(plan.num_trials if plan else 0, begun)
    by_status = ", ".join(f"{counts[status]} {status}" for status in STATUS_COLORS if status in counts)
    tiles = [("trials", f"{begun} of {planned}" if begun < planned else f"{begun}", by_status or "none yet")]
    best = search.best
    if best is not None:
        tiles.append((f"best {search.spec.metric}", number(best.value, ".5g"), f"trial {best.number}"))
    at_once = f"{plan.trials_at_once} at once" if plan else ""
    tiles.append(("wall time", format_duration(wall_seconds(search.run)), at_once))
    starts = [trial for trial in search.book.trials.values() if trial.start_s is not None]
    if starts:
        num_warm = sum(trial.is_warm for trial in starts)
        median_s = statistics.median(trial.start_s or 0.0 for trial in starts)
        tiles.append(("start of a trial", format_duration(median_s), f"median; {num_warm} of {len(starts)} warm"))
    cost = search.run.newest("CostUpdated")
    if cost is not None:
        tiles.append(("cost", f"{number(cost.get('usd'), ',.2f')} USD", "all machines together"))
    return f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _tile(name: str, value: str, note: str) -> str:
    return (
        f'<div class="card"><span class="soft">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="soft">{escape(note)}</span></div>'
    )


def _best(search: _Search) -> str:
    best = search.best
    if best is None:
        text = "No trial has been judged." if search.book.trials else "No trial has been begun."
        return f'<section class="card"><h2>Best trial</h2><p class="soft">{text}</p></section>'
    of_total = f" of {best.total_steps}" if best.total_steps else ""
    pairs = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(shown(value))}</dd></div>" for key, value in best.values.items()
    )
    moves = "; ".join(f"at step {step} from the state of trial {donor}" for step, donor in best.moves)
    notes = [
        f"Trial {best.number}, {best.status}: {search.spec.metric} {number(best.value, '.6g')} "
        f"at step {best.step}{of_total}.",
        f"It went on with other values {moves}." if moves else "",
        "Its values were found with a proxy of the job." if search.spec.proxy else "",
    ]
    if search.run.status != "running":
        notes.append("The job with the values that were found is best.yaml, beside this page.")
    return (
        f'<section class="card best"><h2>Best trial</h2><p class="soft">{escape(" ".join(filter(None, notes)))}</p>'
        f'<dl class="values">{pairs}</dl></section>'
    )


def _figures(search: _Search) -> str:
    spec, book = search.spec, search.book
    shares = importances(spec, book)
    judged = "No trial has been judged yet."
    return "".join(
        [
            '<div class="pair">',
            _figure("Best so far", "Every trial that has ended.", best_so_far(spec, book), otherwise=judged),
            _figure(
                "Learning curves", "Every trial that was judged.", learning_curves(spec, book), otherwise=judged
            ),
            "</div>",
            _figure(
                "Values and what came of them",
                "A line for each trial, the better the darker. Drag along an axis to pick some of them.",
                parallel_coordinates(spec, book),
                otherwise=judged,
            ),
            _figure(
                "Which keys mattered",
                "The share of each key in how much the trials differ (fANOVA); a hint when there are few trials.",
                importance_bars(shares),
                otherwise="Not to be told before two trials have ended with different values.",
            ),
        ]
    )


def _figure(title: str, note: str, figure: str, *, otherwise: str) -> str:
    said = note if figure else otherwise
    return f'<section class="card"><h2>{title}</h2><p class="soft">{said}</p>{figure}</section>'


def _table(search: _Search) -> str:
    keys = searched_keys(search.spec)
    names = names_on_axis(keys)
    heads = [("trial", "number"), ("status", ""), ("step", "number"), (search.spec.metric, "number")]
    heads += [(names[key], "number") for key in keys]
    heads += [("took", "number"), ("start", "number"), ("reason", "")]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in heads)
    rows = "".join(_row(trial, keys, is_best=trial is search.best) for trial in search.book.trials.values())
    return (
        '<section class="card"><h2>All trials</h2><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(trial: Trial, keys: Sequence[str], *, is_best: bool) -> str:
    opening = '<tr class="chosen">' if is_best else "<tr>"
    return f"{opening}{''.join(_cells(trial, keys))}</tr>"


def _cells(trial: Trial, keys: Sequence[str]) -> Iterable[str]:
    total = f" / {trial.total_steps}" if trial.total_steps else ""
    yield _cell(trial.number)
    yield f"<td>{_pill(trial.status)}</td>"
    yield _cell(f"{trial.step}{total}")
    yield _cell(number(trial.value, ".5g"))
    yield from (_cell(shown(trial.values[key]) if key in trial.values else "-") for key in keys)
    yield _cell(format_duration(math.nan if trial.seconds is None else trial.seconds))
    yield _cell(format_duration(math.nan if trial.start_s is None else trial.start_s))
    moves = [f"from trial {donor} at step {step}" for step, donor in trial.moves]
    yield f'<td class="text">{escape("; ".join([*filter(None, [trial.reason]), *moves]))}</td>'


def _cell(value: Any) -> str:
    return f'<td class="number">{escape(str(value))}</td>'


def _pill(status: str) -> str:
    color = STATUS_COLORS.get(status, STATUS_COLORS["failed" if status == "died" else "waiting"])
    return f'<span class="pill" style="--c:{color}">{escape(status)}</span>'
