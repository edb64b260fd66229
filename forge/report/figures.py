"""The figures of a search's page, drawn by plotly, which runs inside the page and asks nobody for anything.

In go the search, its book and the importances; out comes HTML that works once `script` stands before it. What the
job says stands in a figure as text: plotly would read some of it as markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from forge.config.search import ParameterSpec, SearchSpec
from forge.errors import printable
from forge.report.trial_rows import short_names, shown
from forge.runs.trials import Trial, TrialTable

STATUS_COLORS = {
    "finished": "#2f6bd8",
    "stopped": "#c08a1e",
    "diverged": "#8a4fbf",
    "failed": "#cf3e3e",
    "running": "#1d9a6c",
    "waiting": "#8b95a3",
}
BEST_COLOR = "#e2571b"
_INK, _SOFT, _LINES = "#1c2430", "#647082", "#e7eaef"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# From the best to the worst: dark on white is seen first.
_SCALE = [[0.0, "#17307a"], [0.35, "#2f6bd8"], [0.7, "#8cb8ea"], [1.0, "#c3d3e6"]]
# Tukey's "far out", for what may leave the picture or lose its shade.
_FAR_OUT = 3.0
# For dots: those of trials that a scheduler has stopped early lie far out, and belong there.
_ABSURD = 12.0
_LONGEST = 80
# Beside an axis there is little room.
_LONGEST_ON_AXIS = 28


def script() -> str:
    """plotly.js, whole: no page may ask the internet for it."""
    return f"<script>{get_plotlyjs()}</script>"


def best_so_far(search: SearchSpec, book: TrialTable) -> str:
    """Every trial's value in the order in which they ended, and the best until then; empty if there is none."""
    ended = [trial for trial in book.trials.values() if trial.ended_at is not None]
    ended.sort(key=lambda trial: trial.ended_at or 0.0)
    dots = [(count, trial) for count, trial in enumerate(ended, start=1) if is_drawn(trial)]
    if not dots:
        return ""
    low, high = _fence([_value(trial) for _, trial in dots], width=_ABSURD)
    figure = go.Figure()
    line = book.best_so_far(search.mode)
    figure.add_scatter(
        x=[count for count, _ in line],
        y=[min(max(best, low), high) for _, best in line],
        mode="lines",
        name="best so far",
        line={"color": BEST_COLOR, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    for status, color in STATUS_COLORS.items():
        of_it = [(count, trial) for count, trial in dots if trial.status == status]
        if of_it:
            outside = [not low <= _value(trial) <= high for _, trial in of_it]
            figure.add_scatter(
                x=[count for count, _ in of_it],
                y=[min(max(_value(trial), low), high) for _, trial in of_it],
                mode="markers",
                name=status,
                marker={
                    "color": color,
                    "size": 9,
                    "line": {"color": "white", "width": 1},
                    "symbol": ["triangle-up" if is_out else "circle" for is_out in outside],
                },
                text=[_told(search, trial) for _, trial in of_it],
                hovertemplate="%{text}<extra></extra>",
            )
    figure.update_xaxes(
        title="trials that have ended", range=[0.3, len(ended) + 0.7], dtick=_whole_tick(len(ended))
    )
    figure.update_yaxes(title=_plain(search.metric))
    return _html(figure, name="best-so-far", height=340)


def learning_curves(search: SearchSpec, book: TrialTable) -> str:
    """The metric over the steps of every trial, the best one over all others; empty if none was judged."""
    best = book.best(search.mode)
    trials = [trial for trial in book.trials.values() if trial.reports]
    if not trials:
        return ""
    values = [value for trial in trials for _, value in trial.reports if math.isfinite(value)]
    figure = go.Figure()
    listed: set[str] = set()
    for trial in sorted(trials, key=lambda trial: trial is best):
        is_best = trial is best
        name = f"best: trial {trial.number}" if is_best else trial.status
        finite = [(step, value if math.isfinite(value) else None) for step, value in trial.reports]
        color = BEST_COLOR if is_best else STATUS_COLORS.get(trial.status, _SOFT)
        figure.add_scatter(
            x=[step for step, _ in finite],
            y=[value for _, value in finite],
            mode="lines" if len(finite) > 1 else "markers",
            name=_plain(name),
            legendgroup=name,
            showlegend=name not in listed,
            opacity=1.0 if is_best else 0.45,
            line={"color": color, "width": 3 if is_best else 1.5},
            hovertemplate=f"trial {trial.number}, step %{{x}}: %{{y:.5g}}<extra></extra>",
        )
        listed.add(name)
    low, high = _widened(*_fence(values, width=_FAR_OUT)) if values else (0.0, 1.0)
    room = 0.04 * (high - low)
    last = max(trial.step for trial in trials)
    figure.update_xaxes(title="step", rangemode="tozero", dtick=_whole_tick(last))
    figure.update_yaxes(title=_plain(search.metric), range=[low - room, high + room])
    return _html(figure, name="learning-curves", height=340)


def parallel_coordinates(search: SearchSpec, book: TrialTable) -> str:
    """A line for each trial through its values to its metric; empty if no trial has a finite value."""
    keys = searched_keys(search)
    trials = [
        trial for trial in book.trials.values() if is_drawn(trial) and all(key in trial.values for key in keys)
    ]
    if not trials:
        return ""
    values = [_value(trial) for trial in trials]
    shades = _widened(*_fence(values, width=_FAR_OUT))
    low, high = _fence(values, width=_ABSURD)
    values = [min(max(value, low), high) for value in values]
    names = names_on_axis(keys)
    dimensions = [_dimension(search.space[key], [trial.values[key] for trial in trials]) for key in keys]
    for key, dimension in zip(keys, dimensions, strict=True):
        dimension["label"] = _plain(names[key])
    metric = {
        "label": f"<b>{_plain(search.metric)}</b>",
        "values": values,
        "range": list(_widened(low, high)),
        "tickformat": ".4~g",
    }
    figure = go.Figure(
        go.Parcoords(
            dimensions=[*dimensions, metric],
            line={
                "color": values,
                "colorscale": _SCALE,
                "reversescale": search.mode == "max",
                "cmin": shades[0],
                "cmax": shades[1],
                "showscale": False,
            },
            labelfont={"size": 13, "color": _INK},
            tickfont={"size": 11, "color": _INK},
            rangefont={"size": 1, "color": "rgba(0,0,0,0)"},
            unselected={"line": {"color": "#c9d0da", "opacity": 0.15}},
        )
    )
    figure.update_layout(margin={"l": 70, "r": 70, "t": 56, "b": 28})
    return _html(figure, name="parallel-coordinates", height=400)


def importance_bars(shares: Mapping[str, float]) -> str:
    """Each key's share, the largest on top; empty if it cannot be told."""
    if not shares:
        return ""
    names = names_on_axis(tuple(shares))
    keys = list(shares)[::-1]
    figure = go.Figure(
        go.Bar(
            x=[shares[key] for key in keys],
            y=[_plain(names[key]) for key in keys],
            orientation="h",
            marker={"color": STATUS_COLORS["finished"]},
            text=[f" {shares[key]:.0%}" for key in keys],
            textposition="outside",
            cliponaxis=False,
            customdata=[_plain(printable(key, limit=_LONGEST)) for key in keys],
            hovertemplate="%{customdata}: %{x:.1%}<extra></extra>",
        )
    )
    figure.update_xaxes(range=[0, max(shares.values()) * 1.15], tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(showgrid=False, ticklabelstandoff=8)
    figure.update_layout(bargap=0.45, margin={"l": 8, "r": 16, "t": 12, "b": 8})
    return _html(figure, name="importances", height=60 + 44 * len(keys))


def searched_keys(search: SearchSpec) -> tuple[str, ...]:
    """Those that have values of their own."""
    return tuple(key for key, entry in search.space.items() if entry.of is None)


def names_on_axis(keys: Sequence[str]) -> dict[str, str]:
    """Of each dotted path its short name, as long as an axis has room for."""
    return {key: _shortened(name) for key, name in short_names(keys).items()}


def is_drawn(trial: Trial) -> bool:
    """Whether its last value is a number that a figure can show."""
    return trial.value is not None and math.isfinite(trial.value)


def _html(figure: go.Figure, *, name: str, height: int) -> str:
    axis = {"gridcolor": _LINES, "linecolor": _LINES, "zeroline": False, "automargin": True, "title_standoff": 8}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    if figure.layout.margin.l is None:
        figure.update_layout(margin={"l": 8, "r": 16, "t": 40, "b": 8})
    figure.update_layout(
        template="none",
        height=height,
        font={"family": _FONT, "size": 12, "color": _INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"bgcolor": "white", "bordercolor": _LINES, "font": {"color": _INK}, "align": "left"},
    )
    found: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        default_height=f"{height}px",
        config={"responsive": True, "displayModeBar": False},
    )
    return found


def _dimension(entry: ParameterSpec, values: Sequence[Any]) -> dict[str, Any]:
    """One axis of the parallel coordinates."""
    if entry.values is not None:
        known = [json.dumps(value) for value in entry.values]
        places = [json.dumps(value) for value in values]
        known += [place for place in dict.fromkeys(places) if place not in known]
        return {
            "values": [known.index(place) for place in places],
            "tickvals": list(range(len(known))),
            "ticktext": [_shortened(shown(json.loads(place))) for place in known],
            "range": list(_widened(0, len(known) - 1)),
        }
    assert entry.ends is not None, "what follows from another key has no axis"
    # A population may leave the range.
    low, high = min(entry.ends[0], *values), max(entry.ends[1], *values)
    if entry.loguniform is not None:
        ticks = log_ticks(low, high)
        return {
            "values": [math.log10(value) for value in values],
            "range": [math.log10(low), math.log10(high)],
            "tickvals": [math.log10(tick) for tick in ticks],
            "ticktext": [f"{tick:.3g}" for tick in ticks],
        }
    found = {"values": list(values), "range": [low, high]}
    if entry.int is not None:
        step = max(1, math.ceil((high - low) / 10))
        ticks = [tick for tick in range(int(low), int(high) + 1, step) if high - tick >= step] + [high]
        return found | {"tickvals": ticks, "ticktext": [f"{tick:,.0f}" for tick in ticks]}
    return found | {"tickformat": ".4~g"}


def log_ticks(low: float, high: float) -> list[float]:
    """The ends, and between them 1, 2 and 5 of each order of magnitude, or 1 alone where that were too many."""
    orders = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    heads = (1, 2, 5) if span < 3 else (1,)
    between = [head * 10.0**order for order in orders for head in heads]
    # Texts that stand closer would lie upon each other.
    apart = [tick for tick in between if min(math.log10(tick / low), math.log10(high / tick)) > span / 20]
    return [low, *apart, high]


def _fence(values: Sequence[float], *, width: float) -> tuple[float, float]:
    """The ends of the values, or so many times the middle half's length beyond it where that is nearer.

    What lies further out would press all others together.
    """
    ordered = sorted(values)
    quarter, three_quarters = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    box = (three_quarters - quarter) or math.inf
    return max(ordered[0], quarter - width * box), min(ordered[-1], three_quarters + width * box)


def _widened(low: float, high: float) -> tuple[float, float]:
    """An axis needs two ends."""
    return (low, high) if low < high else (low - (abs(low) * 0.01 or 1.0), high + (abs(high) * 0.01 or 1.0))


def _whole_tick(most: int) -> int | None:
    """From one tick to the next, where plotly would put ticks between whole numbers."""
    return 1 if most <= 12 else None


def _told(search: SearchSpec, trial: Trial) -> str:
    """A trial where the pointer rests on it."""
    names = names_on_axis(searched_keys(search))
    values = [f"{names[key]}: {shown(trial.values[key])}" for key in names if key in trial.values]
    lines = [f"trial {trial.number}, {trial.status}: {_value(trial):.5g} at step {trial.step}", *values]
    return "<br>".join(_plain(line) for line in lines)


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def _shortened(text: str) -> str:
    return printable(text, limit=_LONGEST_ON_AXIS)


def _plain(text: str) -> str:
    """Text that plotly would read as markup, which knows `&lt;` but not `&quot;`; an axis' tick text is none."""
    return escape(text, quote=False)
