"""The trials of a search as a table that fits a terminal: choice, order and width of its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forge.errors import printable
from forge.runs.trials import Mode, Trial, TrialTable
from forge.units import format_duration

_MAX_CHARS = 80
_MIN_VALUES_CHARS_WITH_TIME = 16
_MIN_VALUES_CHARS = 8
"""With fewer characters the column of values is left out."""


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Shorten dotted keys to as many last parts as distinguish them."""
    parts = {key: key.split(".") for key in keys}
    names: dict[str, str] = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        sizes = range(1, len(own) + 1)
        size = next((n for n in sizes if all(other[-n:] != own[-n:] for other in others)), len(own))
        names[key] = ".".join(own[-size:])
    return names


def values_in_short(values: Mapping[str, Any]) -> str:
    """`lr=0.003 total_steps=40`."""
    names = short_names(values)
    return " ".join(f"{names[key]}={shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    """Format a value of the job on one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), limit=_MAX_CHARS)


def select_trials(table: TrialTable, *, mode: Mode, room: int) -> list[Trial]:
    """Return at most `room` trials: the running ones, the best one, then the newest first."""
    running = [trial for trial in table.trials.values() if trial.status == "running"]
    best = table.best(mode)
    first = [*running, *([best] if best is not None and best not in running else [])]
    rest = [trial for trial in reversed(table.trials.values()) if trial not in first]
    return [*first, *rest][: max(0, room)]


def trial_rows(
    trials: Sequence[Trial], *, now: float | None, total_steps: int, best: Trial | None = None
) -> list[list[str]]:
    """Rows of trial, status, step, value, values and time; the best trial's number has a star.

    Args:
        now: seconds since the epoch while the search is running; None afterwards.
        total_steps: of a trial that has not started yet.
    """
    return [
        [
            f"{'*' if trial is best else ''}{trial.number}",
            status_of(trial, goes_on=now is not None),
            f"{trial.step}/{trial.total_steps or total_steps}",
            format_value(trial.value),
            values_in_short(trial.values),
            _time_of(trial, now),
        ]
        for trial in trials
    ]


def status_of(trial: Trial, *, goes_on: bool) -> str:
    """Return a trial's status; `unfinished` if the search ended before the trial."""
    return trial.status if goes_on or trial.is_over else "unfinished"


def format_value(value: float | None) -> str:
    """Format the metric of a trial with 4 decimals or digits; `-` if it is None or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if 0.01 <= abs(value) < 1e4 else f"{value:.4g}"


def columns(metric: str) -> list[str]:
    """Return the column names of `trial_rows`; those of numbers start with `#`."""
    return ["#trial", "status", "#step", f"#{metric}", "values", "#time"]


def fit_table(metric: str, rows: Sequence[Sequence[str]], *, width: int) -> list[str]:
    """Format `trial_rows` as lines of at most `width` characters, the column names first.

    The column `values` gets the remaining width and is truncated. If that is too little, the time is left out, then
    names and gaps are shortened, then the values are left out too.
    """
    names, short = columns(metric), ["#", *columns(metric.rpartition("/")[2])[1:]]
    for head, left_out, gap in (
        (names, (), "  "),
        (names, ("#time",), "  "),
        (short, ("#time",), " "),
        (short, ("#time", "values"), " "),
    ):
        kept = [index for index, name in enumerate(head) if name not in left_out]
        shown = [head[index] for index in kept]
        table = [[name.lstrip("#") or name for name in shown], *([row[index] for index in kept] for row in rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        if "values" not in shown:
            break
        at = shown.index("values")
        wanted = widths[at]
        widths[at] = min(wanted, width - (sum(widths) - wanted) - len(gap) * (len(widths) - 1))
        least = _MIN_VALUES_CHARS if left_out else _MIN_VALUES_CHARS_WITH_TIME
        if widths[at] >= min(wanted, least):
            break
    return [cut(_line(row, widths, shown, gap=gap), width=width) for row in table]


def cut(text: str, *, width: int) -> str:
    """Truncate a text to `width` characters, with an ellipsis."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"[:width]


def bars(shares: Mapping[str, float], *, width: int = 20) -> list[list[str]]:
    """Rows of name, share and a bar of at most `width` characters, the largest share first."""
    names, largest = short_names(shares), max([0.0, *filter(math.isfinite, shares.values())]) or 1.0
    by_size = sorted(shares, key=lambda key: -shares[key] if math.isfinite(shares[key]) else math.inf)
    return [
        [names[key], f"{shares[key]:.0%}", "█" * round(width * max(0.0, shares[key]) / largest)]
        if math.isfinite(shares[key])
        else [names[key], "-", ""]
        for key in by_size
    ]


def _line(row: Sequence[str], widths: Sequence[int], names: Sequence[str], *, gap: str) -> str:
    cells = [
        cell.rjust(width) if name.startswith("#") else cut(cell, width=width).ljust(width)
        for cell, width, name in zip(row, widths, names, strict=True)
    ]
    return gap.join(cells).rstrip()


def _time_of(trial: Trial, now: float | None) -> str:
    seconds = trial.seconds if trial.seconds is not None else now and now - trial.suggested_at
    return "-" if seconds is None else format_duration(max(0.0, seconds))
