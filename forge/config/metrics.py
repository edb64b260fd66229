"""Which metrics a job reports, and whether smaller or larger values of each are better.

Those of every run and of the built-in objectives are known from tables. Those of an objective of the user's own
are in its `metric_directions`, which are known only after its import: a job that names one is checked again when
the plan is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from forge.config.evaluate import METRIC_PREFIX
from forge.config.search import SearchSpec
from forge.config.section import FieldError, raise_errors
from forge.config.training import TrainingSpec
from forge.objective.registry import NUMBER_METRICS, OBJECTIVES, Direction
from forge.user_code import is_reference

Directions = Mapping[str, Direction]

RUN_METRICS: Directions = {
    "eval/loss": "min",
    "train/loss": "min",
    "speed/tokens_per_s": "max",
    "speed/mfu": "max",
    "speed/step_s": "min",
    "memory/peak_gib": "min",
}
"""What every run reports, by its key in `metrics.jsonl`."""


def reported_metrics(declared: Directions, *, parts: Sequence[str] = ()) -> dict[str, Direction]:
    """Return all metrics of a run whose objective declares these, by key in `metrics.jsonl`.

    Args:
        parts: names of the parts of a mixture.
    """
    own = {f"{kind}/{name}": direction for kind in ("eval", "train") for name, direction in declared.items()}
    return {**RUN_METRICS, **dict.fromkeys((f"eval/loss/{part}" for part in parts), "min"), **own}


def check_metrics(
    training: TrainingSpec,
    search: SearchSpec | None,
    *,
    of_user: Mapping[str, Directions],
    parts: Sequence[str] = (),
) -> SearchSpec | None:
    """Check the metrics that a job names.

    Args:
        of_user: `metric_directions` of objectives of the user's own, as far as known; a metric that only another
            one may report is not checked.
        parts: names of the parts of `data.mixture`.

    Returns: the search with its mode: unless given, the direction of its metric.

    Raises: FieldErrors for metrics that are not reported.
    """
    objectives = _objectives(training, search)
    tables = [
        _builtin_metrics(name, training, search) if name in OBJECTIVES else of_user.get(name) for name in objectives
    ]
    known = _common([reported_metrics(table, parts=parts) for table in tables if table is not None])
    is_complete = all(table is not None for table in tables)
    stopping = training.early_stopping
    errors: list[FieldError] = []
    is_of_task = stopping is not None and stopping.metric.startswith(METRIC_PREFIX)  # checked with the task files
    if stopping is not None and not is_of_task and (is_complete or not stopping.metric.startswith("eval/")):
        evaluated = [name for name in known if name.startswith("eval/")]
        if training.ema is not None and training.ema.evaluate == "always":
            evaluated += [f"eval/ema_{name.removeprefix('eval/')}" for name in evaluated]
        errors += _unknown(stopping.metric, evaluated, key="training.early_stopping.metric", what="evaluations")
    if search is not None and is_complete and not search.metric.startswith(METRIC_PREFIX):
        errors += _unknown(search.metric, list(known), key="search.metric", what="trials")
    raise_errors(errors)
    if search is None:
        return None
    is_known = search.metric in (known if is_complete else RUN_METRICS)
    if search.mode is not None or not is_known:
        return search
    found = search.model_copy()
    found.__dict__["mode"] = known[search.metric]  # without making it a key that the user has set
    return found


def _builtin_metrics(name: str, training: TrainingSpec, search: SearchSpec | None) -> Directions:
    """The metrics of a built-in objective; of a classifier, those of its kind."""
    metrics = OBJECTIVES[name].metrics
    is_fixed = search is None or "training.classification.kind" not in {**search.space, **search.proxy}
    if name != "classification" or not is_fixed:
        return metrics
    of_numbers = training.classification.kind == "regression"
    return {key: metrics[key] for key in metrics if (key in NUMBER_METRICS) is of_numbers}


def _unknown(name: str, known: list[str], *, key: str, what: str) -> list[FieldError]:
    """The problem of a metric that is not known; empty if it is known."""
    if name in known:
        return []
    nearest = difflib.get_close_matches(name, known, n=1)
    problem = f"is not a metric; {what} report {', '.join(known)}"
    return [FieldError(key, problem, nearest=nearest[0] if nearest else None, depends_on=("training.objective",))]


def _objectives(training: TrainingSpec, search: SearchSpec | None) -> list[str]:
    """The objective of a run, or those that the trials of a search may have."""
    key = "training.objective"
    if search is None:
        return [training.objective]
    if key in search.space:
        return [name for name in search.space[key].values or () if name in OBJECTIVES or is_reference(name)]
    return [search.proxy.get(key, training.objective)]


def _common(tables: list[dict[str, Direction]]) -> dict[str, Direction]:
    """The metrics that are in every table, with the same direction."""
    first, *others = tables or [dict(RUN_METRICS)]
    return {
        name: direction
        for name, direction in first.items()
        if all(other.get(name) == direction for other in others)
    }
