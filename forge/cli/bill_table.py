"""The bill of a job as `forge plan` shows it: what to choose, the frontier as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from forge.cli import display
from forge.plan.bill import Bill, BillChoice
from forge.plan.candidates import NO_MEMORY, WRONG_COUNT, Candidate, describe
from forge.plan.throughput import Estimate
from forge.pricing.offer import Offer
from forge.units import format_duration

_ROWS = 8
_EXAMPLES = 6
_JSON_CANDIDATES = 20
"""Of the cheapest, in `-o json` without `--candidates`."""
_PLOT_WIDTH, _PLOT_HEIGHT = 76, 10
_DRAWN = 3.0
_WIDE_TABLE = 80
"""Characters from which a table has all columns."""


def show_bill(bill: Bill, *, title: str, num_rows: int | None = None) -> None:
    """Print a bill.

    Args:
        title: what is priced.
        num_rows: list the cheapest candidates, so many, instead of the frontier.
    """
    display.heading(title, f"{len(bill.candidates):,} candidates")
    display.facts([(choice.question, _answer(choice)) for choice in bill.choices])
    if not bill.candidates:
        display.warning(_no_candidate(bill))
    frontier = bill.frontier
    rows = _thinned(frontier) if num_rows is None else bill.candidates[:num_rows]
    if rows:
        display.OUT.print()
        _show_table(rows)
    if len({(one.hours.likely, one.usd.likely) for one in bill.candidates}) > 1:
        display.OUT.print()
        width = min(_PLOT_WIDTH, display.terminal_width() or _PLOT_WIDTH)
        for line in plot_lines(bill.candidates, frontier=frontier, width=width):
            display.OUT.print(line)
    if num_rows is None and len(rows) < len(bill.candidates):
        display.message(
            f"no other of the {len(bill.candidates):,} candidates is cheaper and as fast; --candidates N lists them"
        )
    for left_out in bill.left_out:
        display.message(f"left out: {_left_out(left_out.num_offers, left_out.reason, left_out.examples)}")
    for note in (*_unknown_parts(rows), *bill.notes):
        display.message(note)


def bill_record(bill: Bill, *, num_candidates: int | None = None) -> dict[str, Any]:
    """Return the bill for `-o json`; thousands of candidates would be megabytes.

    Args:
        num_candidates: how many of the cheapest are listed, beside the frontier.
    """
    frontier, most = {id(one) for one in bill.frontier}, num_candidates or _JSON_CANDIDATES
    listed = [one for rank, one in enumerate(bill.candidates) if rank < most or id(one) in frontier]
    reason = f"neither on the frontier nor among the cheapest ({most:,})"
    num_others = len(bill.candidates) - len(listed)
    return {
        "max_hours": bill.max_hours,
        "max_usd": bill.max_usd,
        "choices": [
            {
                "question": choice.question,
                "candidate": None if choice.candidate is None else _record(choice.candidate),
                "problem": choice.problem,
            }
            for choice in bill.choices
        ],
        "num_candidates": len(bill.candidates),
        "candidates": [_record(one) | {"is_on_frontier": id(one) in frontier} for one in listed],
        "not_listed": [{"reason": reason, "num_candidates": num_others}] if num_others else [],
        "left_out": [
            {"reason": one.reason, "num_offers": one.num_offers, "examples": list(one.examples[:_EXAMPLES])}
            for one in bill.left_out
        ],
        "notes": list(bill.notes),
    }


def plot_lines(candidates: Sequence[Candidate], *, frontier: Sequence[Candidate], width: int) -> list[str]:
    """Draw hours against USD, both on logarithmic scales: `o` on the frontier, `.` elsewhere.

    Candidates that take more than `_DRAWN` times the hours or the USD of all on the frontier are not drawn.

    Args:
        candidates: at least two that differ.
        width: of a line in characters.
    """
    drawn = _near(candidates, frontier=frontier)
    hours = [one.hours.likely for one in drawn]
    usd = [one.usd.likely for one in drawn]
    most, least = _usd(max(usd)), _usd(min(usd))
    margin = max(len(most), len(least), 3) + 1
    columns, rows = width - margin - 1, _PLOT_HEIGHT
    grid = [[" "] * columns for _ in range(rows)]
    for mark, points in ((".", drawn), ("o", frontier)):
        for one in points:
            x = _position(one.hours.likely, low=min(hours), high=max(hours), cells=columns)
            y = _position(one.usd.likely, low=min(usd), high=max(usd), cells=rows)
            grid[rows - 1 - y][x] = mark
    labels = [most, "USD", *[""] * (rows - 3), least]
    lines = [f"{label:>{margin - 1}} |{''.join(cells).rstrip()}" for label, cells in zip(labels, grid, strict=True)]
    left, right = format_duration(3600 * min(hours)), format_duration(3600 * max(hours))
    gap = columns - len(left) - len(right)
    middle = "time" if gap > 6 else ""
    return [*lines, f"{'':{margin}}+{'-' * columns}", f"{'':{margin + 1}}{left}{middle:^{max(1, gap)}}{right}"]


def range_text(value: Estimate, *, unit: str) -> str:
    """Return `12.40 USD (9.10 to 20.00)`, or the same in hours."""
    if unit == "USD":
        return f"{_usd(value.likely)} USD ({_usd(value.low)} to {_usd(value.high)})"
    low, likely, high = (format_duration(3600 * hours) for hours in (value.low, value.likely, value.high))
    return f"{likely} ({low} to {high})"


def _answer(choice: BillChoice) -> str:
    one = choice.candidate
    if one is None:
        return choice.problem or ""
    return f"{range_text(one.hours, unit='h')}, {range_text(one.usd, unit='USD')}: {describe(one)}"


def _no_candidate(bill: Bill) -> str:
    """Say what would make machines possible."""
    reasons = [one.reason for one in bill.left_out]
    options = ["other numbers of resources.workers"] if any(WRONG_COUNT in one for one in reasons) else []
    if NO_MEMORY in reasons:
        options += ["more resources.workers", "a higher training.zero.stage", "training.activation_checkpointing"]
    possible = f"; it may be possible with {' or '.join(options)}" if options else ""
    return f"no offer can run this job{possible}"


def _thinned(frontier: Sequence[Candidate]) -> Sequence[Candidate]:
    """At most `_ROWS`, evenly chosen, the cheapest and the fastest among them."""
    if len(frontier) <= _ROWS:
        return frontier
    return [frontier[round(index * (len(frontier) - 1) / (_ROWS - 1))] for index in range(_ROWS)]


def _near(candidates: Sequence[Candidate], *, frontier: Sequence[Candidate]) -> Sequence[Candidate]:
    most_h = _DRAWN * max(one.hours.likely for one in frontier)
    most_usd = _DRAWN * max(one.usd.likely for one in frontier)
    return [one for one in candidates if one.hours.likely <= most_h and one.usd.likely <= most_usd]


def _show_table(rows: Sequence[Candidate]) -> None:
    """Print candidates; a narrow terminal has no room for the GPUs and the interruptions."""
    columns = {
        "machines": [f"{one.num_machines} x {one.offer.instance}" for one in rows],
        "GPUs": [f"{one.world_size} {one.offer.gpu}" for one in rows],
        "where": [f"{one.offer.cloud} {one.offer.region}{' spot' if one.is_spot else ''}" for one in rows],
        "#time": [format_duration(3600 * one.hours.likely) for one in rows],
        "#USD": [_usd(one.usd.likely) + ("+" if one.cost.unknown else "") for one in rows],
        "#lost": [f"{one.num_interruptions.likely:.2g}" if one.is_spot else "" for one in rows],
    }
    if (display.terminal_width() or _WIDE_TABLE) < _WIDE_TABLE:
        del columns["GPUs"], columns["#lost"]
    display.table([*columns], [list(row) for row in zip(*columns.values(), strict=True)])


def _usd(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _left_out(num_offers: int, reason: str, examples: Sequence[str]) -> str:
    more = len(examples) - _EXAMPLES
    names = ", ".join(examples[:_EXAMPLES]) + (f" and {more} more" if more > 0 else "")
    return f"{num_offers:,} offer{'s' if num_offers != 1 else ''}: {reason} ({names})"


def _unknown_parts(rows: Sequence[Candidate]) -> list[str]:
    parts = list(dict.fromkeys(part for one in rows for part in one.cost.unknown))
    return [f"+: without {', '.join(parts)}, whose price there is unknown"] if parts else []


def _position(value: float, *, low: float, high: float, cells: int) -> int:
    if high <= low:
        return 0
    return round(math.log(value / low) / math.log(high / low) * (cells - 1))


def _record(one: Candidate) -> dict[str, Any]:
    offer: Offer = one.offer
    return {
        "cloud": offer.cloud,
        "region": offer.region,
        "zone": offer.zone,
        "instance": offer.instance,
        "gpu": offer.gpu,
        "gpus_per_machine": offer.num_gpus,
        "num_machines": one.num_machines,
        "is_spot": one.is_spot,
        "usd_per_hour": one.usd_per_hour,
        "hours": _range(one.hours),
        "uninterrupted_hours": _range(one.uninterrupted_hours),
        "usd": _range(one.usd),
        "usd_parts": one.cost.parts,
        "interruptions": _range(one.num_interruptions),
        "restarts": _range(one.num_restarts),
        "pausing_hours": one.pausing_hours,
        "repeated_hours": one.repeated_hours,
        "waiting_hours": one.waiting_hours,
        "observed": str(offer.observed),
    }


def _range(value: Estimate) -> dict[str, float]:
    return {"low": value.low, "likely": value.likely, "high": value.high}
