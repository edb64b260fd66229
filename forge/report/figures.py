"""The figures of a search's report, drawn by `optuna.visualization` from a study built in memory.

Takes the search and its trial table; returns what plotly.js draws. Names of keys and values of choices come from
the job file. plotly would read them as markup, so they are escaped when the study is built, and everything drawn
from it is safe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import plot_intermediate_values, plot_optimization_history, plot_parallel_coordinate

from forge.config.search import SearchSpec
from forge.report.page import PageFigure, label
from forge.report.trial_rows import short_names, shown
from forge.runs.trials import Trial, TrialTable
from forge.search.importance import distributions, quiet_optuna

_MAX_DRAWN = 1e150
"""Larger values overflow when an axis is scaled."""
_STATES = {
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.COMPLETE,
    "running": TrialState.RUNNING,
    "waiting": TrialState.WAITING,
    "diverged": TrialState.PRUNED,  # its curve is drawn, its last value is not compared with others
    "failed": TrialState.PRUNED,
}
_FAR_OUT = 12.0
"""Interquartile ranges beyond the quartiles where an axis ends; trials stopped early by a scheduler stay inside."""
_BEST_COLOR = "#e2571b"


def build_figures(search: SearchSpec, table: TrialTable, shares: Mapping[str, float]) -> Iterator[PageFigure]:
    """Draw the optimization history, the learning curves, the parallel coordinates and the importances."""
    with quiet_optuna():
        study = build_study(search, table)
        metric = label(search.metric)
        ended = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
        values = [trial.value for trial in ended]
        reported = [value for trial in study.trials for value in trial.intermediate_values.values()]
        none_yet = "No trial has reported a value yet."
        yield _figure(
            "Optimization history",
            "The value of every trial that ended, and the best so far.",
            plot_optimization_history(study, target_name=metric) if ended else None,
            otherwise=none_yet,
            shown_on_y=values,
        )
        yield _figure(
            "Learning curves",
            f"{search.metric} at every evaluation of every trial; the best trial is the thick line.",
            _learning_curves(study, best=table.best(search.direction)) if reported else None,
            otherwise=none_yet,
            shown_on_y=reported,
            y_title=metric,
        )
        yield _figure(
            "Parallel coordinates",
            "One line per trial, from its metric through its values.",
            plot_parallel_coordinate(study, target_name=metric) if ended else None,
            otherwise=none_yet,
        )
    yield _figure(
        "Importances",
        "The share of each key in how much the trials differ (fANOVA); unreliable with few trials.",
        _importance_bars(shares) if shares else None,
        otherwise="Unknown until two trials have ended with different values.",
    )


def build_study(search: SearchSpec, table: TrialTable) -> optuna.Study:
    """Build an Optuna study whose trial numbers, values and intermediate values are those of the search."""
    names, axes = labels(search), distributions(search)
    study = optuna.create_study(direction="minimize" if search.direction == "min" else "maximize")
    missing = optuna.trial.create_trial(state=TrialState.FAIL)  # draws nothing; Optuna counts from 0, forge from 1
    for number in range(max(table.trials, default=-1) + 1):
        trial = table.trials.get(number)
        study.add_trial(missing if trial is None else _frozen(trial, names, axes))
    return study


def labels(search: SearchSpec) -> dict[str, str]:
    """The short name of each searched key, escaped and short enough for an axis."""
    return axis_labels([key for key, entry in search.space.items() if entry.of is None])


def axis_labels(keys: Sequence[str]) -> dict[str, str]:
    return {key: label(name) for key, name in short_names(keys).items()}


def _frozen(trial: Trial, names: Mapping[str, str], axes: Mapping[str, BaseDistribution]) -> FrozenTrial:
    curve = {step: value for step, value in trial.reports if math.isfinite(value)}
    state = _STATES.get(trial.status, TrialState.PRUNED)
    if state is TrialState.COMPLETE and not (trial.value is not None and math.isfinite(trial.value)):
        state = TrialState.PRUNED
    params = {key: value for key, value in trial.values.items() if key in axes and _fits(axes[key], value)}
    return optuna.trial.create_trial(
        state=state,
        value=trial.value if state is TrialState.COMPLETE else None,
        params={names[key]: _param(value, axes[key]) for key, value in params.items()},
        distributions={names[key]: _widened(axes[key], value) for key, value in params.items()},
        intermediate_values=curve,
    )


def _fits(axis: BaseDistribution, value: Any) -> bool:
    """Whether a value from a file can be drawn on an axis, if need be by extending it."""
    if isinstance(axis, CategoricalDistribution):
        return True
    assert isinstance(axis, (FloatDistribution, IntDistribution))
    is_number = type(value) is int or (type(value) is float and isinstance(axis, FloatDistribution))
    return is_number and abs(value) < _MAX_DRAWN and (value > 0 or not axis.log)


def _param(value: Any, axis: BaseDistribution) -> Any:
    return _choice(value) if isinstance(axis, CategoricalDistribution) else value


def _choice(value: Any) -> Any:
    """Keep numbers, so that Optuna orders the axis; convert other values to escaped text."""
    return value if type(value) in (int, float) else label(shown(value))


def _widened(axis: BaseDistribution, value: Any) -> BaseDistribution:
    """Escape an axis's choices, or extend its range to a value that population based training moved outside it."""
    if isinstance(axis, CategoricalDistribution):
        return CategoricalDistribution(list(dict.fromkeys(_choice(choice) for choice in (*axis.choices, value))))
    assert isinstance(axis, (FloatDistribution, IntDistribution))
    return type(axis)(min(axis.low, value), max(axis.high, value), log=axis.log)


def _learning_curves(study: optuna.Study, *, best: Trial | None) -> go.Figure:
    figure = plot_intermediate_values(study).update_traces(opacity=0.4, line={"width": 1.5})
    if best is not None:
        figure.update_traces(
            opacity=1.0, line={"width": 4, "color": _BEST_COLOR}, selector={"name": f"Trial{best.number}"}
        )
    return figure


def _importance_bars(shares: Mapping[str, float]) -> go.Figure:
    names = axis_labels(tuple(shares))
    keys = sorted(shares, key=lambda key: shares[key])
    bars = go.Bar(
        x=[shares[key] for key in keys],
        y=[names[key] for key in keys],
        orientation="h",
        text=[f"{shares[key]:.0%}" for key in keys],
    )
    return go.Figure(bars, {"xaxis": {"tickformat": ".0%"}, "height": 120 + 40 * len(keys)})


def _figure(
    title: str,
    note: str,
    figure: go.Figure | None,
    *,
    otherwise: str,
    shown_on_y: Sequence[float | None] = (),
    y_title: str | None = None,
) -> PageFigure:
    key = title.lower().replace(" ", "-")
    if figure is None:
        return PageFigure(key=key, title=title, note=otherwise, spec=None)
    finite = [value for value in shown_on_y if value is not None]
    low, high = _fence(finite) if finite else (-math.inf, math.inf)
    hidden = sum(not low <= value <= high for value in finite)
    if hidden:
        room = 0.05 * (high - low)
        figure.update_yaxes(range=[low - room, high + room])
        note += f" {hidden} values far from the others are outside the axis; double-click shows them."
    if y_title is not None:
        figure.update_yaxes(title=y_title)
    figure.update_layout(
        title=None,
        template="plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=figure.layout.height or 380,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
    )
    return PageFigure(key=key, title=title, note=note, spec=json.loads(figure.to_json()))


def _fence(values: Sequence[float]) -> tuple[float, float]:
    """Return an axis range without outliers, which would compress the rest."""
    ordered = sorted(values)
    quarter, three_quarters = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    box = (three_quarters - quarter) or math.inf
    return max(ordered[0], quarter - _FAR_OUT * box), min(ordered[-1], three_quarters + _FAR_OUT * box)
