"""The figures of a run as plotly.js has them: plain `data` and `layout`, for a report and for a live page.

Takes series and records of a run. Every text that comes from a run folder is escaped, since plotly reads markup in
hover texts. Colours of texts and grids are left to the style sheet of the page, which knows light, dark and print.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forge.report.page import PageFigure, label
from forge.report.run_series import RunSeries
from forge.runs.event_text import short, workers
from forge.runs.goodput_report import MembershipChange

PALETTE = ("#2f6bd8", "#e2571b", "#1d9a6c", "#8a4fbf", "#c08a1e", "#0e95a8", "#cf3e3e", "#64748b")
CAUSE_COLORS = {
    "growth": "#1d9a6c",
    "notice": "#c08a1e",
    "yield": "#0e95a8",
    "loss": "#cf3e3e",
    "hang": "#8a4fbf",
    "failure": "#8a4fbf",
}
_MAX_CHANGES = 300
_MAX_REASON_CHARS = 160
_CLEAR = "rgba(0,0,0,0)"


def loss_figure(series: RunSeries, changes: Sequence[MembershipChange]) -> PageFigure:
    """Training and held-out loss over the steps, with a line at every membership change."""
    drawn = [change for change in changes if change.from_step is not None][-_MAX_CHANGES:]
    notes = [f"each point is the mean of {series.steps_per_point:,} steps"] if series.steps_per_point > 1 else []
    if series.num_not_finite:
        notes.append(f"the loss of {series.num_not_finite:,} steps is not a finite number")
    if changes:
        which = "a change of the workers" if len(drawn) == len(changes) else f"one of the last {len(drawn)} changes"
        notes.append(f"a dotted line is {which}")
    data = [
        _line(series.steps, series.values["train/loss"], name="training", color=PALETTE[0]),
        _line(series.steps, series.values["eval/loss"], name="held out", color=PALETTE[1], mode="lines+markers"),
    ]
    lines = [_vertical(change.from_step, color=_color(change)) for change in drawn]
    return _figure(
        "loss",
        title="Loss",
        note="; ".join(notes),
        data=[*data, _change_points(drawn, series)] if drawn else data,
        layout={"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "loss"}}, "shapes": lines},
        height=380,
    )


def speed_figure(series: RunSeries, changes: Sequence[MembershipChange], *, since: float) -> PageFigure:
    """Tokens per second and, where the peak of the hardware is known, MFU over the hours since the start."""
    breaks = [change.time for change in changes[-_MAX_CHANGES:]]
    times = sorted([*series.times, *breaks])
    hours = _hours(times, since=since)

    def broken(key: str) -> list[float | None]:
        """The values of a metric in the order of `times`, with a gap at every change."""
        found = [*zip(series.times, series.values[key], strict=True), *((at, None) for at in breaks)]
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    mfu = broken("speed/mfu")
    data = [_line(hours, broken("speed/tokens_per_s"), name="tokens/s", color=PALETTE[2])]
    layout: dict[str, Any] = {"yaxis": {"title": {"text": "tokens/s"}, "rangemode": "tozero"}}
    if any(value is not None for value in mfu):
        data.append(_line(hours, mfu, name="MFU", color=PALETTE[3], axis="y2"))
        layout["yaxis2"] = {
            "title": {"text": "MFU"},
            "overlaying": "y",
            "side": "right",
            "rangemode": "tozero",
            "tickformat": ".2~%",  # below 1 % too, as on a CPU; ~ leaves zeros out
            "showgrid": False,
        }
    return _figure(
        "speed",
        title="Throughput",
        note="of each step; pauses are in where the time went",
        data=data,
        layout=layout | {"xaxis": _HOURS},
    )


def new_points(series: RunSeries, *, since: float) -> dict[str, dict[str, list[list[float | None]]]]:
    """Return what steps add to the figures of a run: by figure and by name of a line, x and y of its new points."""
    hours = _hours(series.times, since=since)
    lines: list[tuple[str, str, Sequence[float], str]] = [
        ("loss", "training", series.steps, "train/loss"),
        ("loss", "held out", series.steps, "eval/loss"),
        ("speed", "tokens/s", hours, "speed/tokens_per_s"),
        ("speed", "MFU", hours, "speed/mfu"),
    ]
    found: dict[str, dict[str, list[list[float | None]]]] = {}
    for figure, name, x, key in lines:
        pairs = [pair for pair in zip(x, series.values[key], strict=True) if pair[1] is not None]
        if pairs:
            found.setdefault(figure, {})[name] = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
    return found


def workers_figure(events: Iterable[Mapping[str, Any]], *, since: float, until: float) -> PageFigure:
    """The world size over the hours since the start: 0 from the end of a generation to the start of the next."""
    at, sizes = [since], [0]
    for event in events:
        match event["event"]:
            case "GenerationStarted":
                size = event["world_size"]
            case "MembershipChangeStarted" | "RunStarted" | "RunFinished" | "RunStopped" | "RunFailed":
                size = 0
            case _:
                continue
        if size != sizes[-1]:
            at.append(event["time"])
            sizes.append(size)
    at.append(max(until, at[-1]))
    sizes.append(sizes[-1])
    trace = _line(_hours(at, since=since), sizes, name="workers", color=PALETTE[5])
    trace["line"] |= {"shape": "hv"}
    trace |= {"fill": "tozeroy", "fillcolor": "rgba(14,149,168,0.15)"}
    return _figure(
        "workers",
        title="World size",
        note="0 while no generation trains",
        data=[trace] if any(sizes) else [],
        layout={
            "xaxis": _HOURS,
            "yaxis": {"title": {"text": "workers"}, "rangemode": "tozero", "dtick": -(-max(sizes) // 6) or 1},
        },
    )


def cost_figure(events: Iterable[Mapping[str, Any]], *, since: float) -> PageFigure:
    """What the run had cost over the hours since the start."""
    costs = [event for event in events if event["event"] == "CostUpdated" and event["usd"] is not None]
    costs = costs[:: len(costs) // 1500 + 1] + costs[-1:]
    hours = _hours([since, *(event["time"] for event in costs)], since=since)
    usd = [0.0, *(event["usd"] for event in costs)]
    trace = _line(hours, usd, name="USD", color=PALETTE[4])
    return _figure(
        "cost",
        title="Cost so far",
        note="of all machines together",
        data=[trace] if costs else [],
        layout={"xaxis": _HOURS, "yaxis": {"title": {"text": "USD"}, "rangemode": "tozero"}},
    )


def curves_figure(
    series: Mapping[str, RunSeries], *, key: str, title: str, since: Mapping[str, float] | None = None
) -> PageFigure:
    """The losses of several runs in one figure, a colour for each; held-out losses are dashed.

    Args:
        series: by the name of a run.
        since: when each run started: draw over hours instead of steps.
    """
    data: list[dict[str, Any]] = []
    for count, (run, one) in enumerate(series.items()):
        x = one.steps if since is None else _hours(one.times, since=since[run])
        color, name = PALETTE[count % len(PALETTE)], label(run)
        data.append(_line(x, one.values["train/loss"], name=name, color=color) | {"legendgroup": str(count)})
        held_out = _line(x, one.values["eval/loss"], name=f"{name}, held out", color=color, mode="lines+markers")
        held_out["line"] |= {"dash": "dash"}
        data.append(held_out | {"legendgroup": str(count), "showlegend": False})
    x_axis = {"title": {"text": "step"}} if since is None else _HOURS
    layout = {"xaxis": x_axis, "yaxis": {"title": {"text": "loss"}}}
    return _figure(key, title=title, note="dashed: on held-out data", data=data, layout=layout, height=420)


_HOURS = {"title": {"text": "hours since the start"}, "rangemode": "tozero"}


def _hours(times: Iterable[float], *, since: float) -> list[float]:
    return [round(max(0.0, time - since) / 3600, 6) for time in times]


def _line(
    x: Sequence[float], y: Sequence[float | None], *, name: str, color: str, mode: str = "lines", axis: str = "y"
) -> dict[str, Any]:
    """One series; points without a value are left out of one with markers and are gaps in a line."""
    pairs = list(zip(x, y, strict=True))
    pairs = [pair for pair in pairs if pair[1] is not None] if mode != "lines" else pairs
    only_point = len(pairs) == 1
    return {
        "type": "scatter",
        "mode": "lines+markers" if only_point else mode,
        "x": [pair[0] for pair in pairs],
        "y": [pair[1] for pair in pairs],
        "name": name,
        "yaxis": axis,
        "line": {"color": color, "width": 2},
    }


def _change_points(changes: Sequence[MembershipChange], series: RunSeries) -> dict[str, Any]:
    """Points on the curve that say what changed when the pointer is over them."""
    at = [change.from_step for change in changes if change.from_step is not None]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "changes",
        "x": at,
        "y": [series.at_step("train/loss", step) for step in at],
        "marker": {"color": [_color(change) for change in changes], "size": 8},
        "hovertext": [_described(change) for change in changes],
        "hoverinfo": "text",
    }


def _described(change: MembershipChange) -> str:
    sizes = f"{change.from_world_size or '-'} → {workers(change.to_world_size or 0)}"
    return f"step {change.from_step}: {sizes}<br>{label(short(change.reason), limit=_MAX_REASON_CHARS)}"


def _color(change: MembershipChange) -> str:
    return CAUSE_COLORS.get(change.cause, PALETTE[-1])


def _vertical(x: float | None, *, color: str) -> dict[str, Any]:
    line = {"color": color, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "x", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _figure(
    key: str, *, title: str, note: str, data: list[dict[str, Any]], layout: dict[str, Any], height: int = 300
) -> PageFigure:
    drawn = [trace for trace in data if any(value is not None for value in trace["y"])]
    common = {
        "height": height,
        "margin": {"l": 56, "r": 56 if "yaxis2" in layout else 16, "t": 12, "b": 44},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "font": {"family": "inherit", "size": 12},
        # By the container, not by the plot: plotly leaves it inside the plot when the page becomes wider.
        "legend": {"orientation": "h", "yref": "container", "y": 1, "yanchor": "top"},
        "showlegend": len(drawn) > 1,
        "hovermode": "closest",
    }
    spec = {"data": drawn, "layout": common | layout} if drawn else None
    return PageFigure(key=key, title=title, note=note if drawn else "Nothing to draw yet.", spec=spec)
