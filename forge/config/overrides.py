"""Change keys of a job: build the job of a trial, and check every value of a search space before anything starts.

Input: a job and values by dotted key. Output: the job as if its file had these values, validated by the same types.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from forge.config.alerts import ALERT_KINDS, AlertsSpec
from forge.config.errors import field_errors
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.locations import SourceMap
from forge.config.search import ParameterSpec, SearchSpec
from forge.errors import JobFileError

_NOWHERE = SourceMap(path="search", locations={})
"""For jobs that were not loaded from a file."""


def job_with(job: JobSpec, values: Mapping[str, Any]) -> JobSpec:
    """Return the job with `values` set, by dotted key.

    Raises: JobFileError that names a key of the job.
    """
    body = job.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        _place(body, key, copy.deepcopy(value))  # a copy, because later values may be placed inside it
    try:
        return JobSpec.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise field_errors(error, root=JobSpec, source=_NOWHERE, reported=())[0] from error


def trial_job(job: JobSpec, values: Mapping[str, Any], *, is_proxied: bool = True) -> JobSpec:
    """Return the job of one trial: without the search's `search` and `alerts`, with the proxy, the values and the
    keys computed from them.

    Args:
        values: by dotted key.
        is_proxied: False for the full job with these values, as in `best.yaml`, which keeps `alerts`.

    Raises: JobFileError that names a key of the job.
    """
    search = search_of(job)
    bare = job.model_copy(update={"search": None, "alerts": None if is_proxied else _alerts_of_run(job)})
    bare.model_fields_set.difference_update({"search"} if bare.alerts is not None else {"search", "alerts"})
    fixed = {**(search.proxy if is_proxied else {}), **values}
    return job_with(bare, fixed | followers(job_with(bare, fixed), search))


def _alerts_of_run(job: JobSpec) -> AlertsSpec | None:
    """Return the alerts of a search for a single run, which has no `search.max_usd` to be alerted about."""
    alerts = job.alerts
    if alerts is None or job.resources.max_usd is not None or set(alerts.on) == set(ALERT_KINDS):
        return alerts
    on = tuple(kind for kind in alerts.on if kind != "budget") or ("finished", "failed")
    return alerts.model_copy(update={"on": on})


def followers(job: JobSpec, search: SearchSpec) -> dict[str, Any]:
    """Return the values of the keys with `of`, computed from the other keys of the job.

    Raises: JobFileError if the other key is not a number.
    """
    found: dict[str, Any] = {}
    for key, entry in search.space.items():
        if entry.of is None:
            continue
        value = value_at(job, entry.of)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _NOWHERE.error(f"search.space.{key}.of", f"'{entry.of}' is not a number")
        product = value * entry.times if entry.times is not None else value / (entry.divided_by or 1)
        found[key] = round(product) if isinstance(value, int) and product == round(product) else product
    return found


def first_values(search: SearchSpec) -> dict[str, Any]:
    """Return, for every searched key, the first value of its list or the lower bound of its range."""
    return {key: _some_values(entry)[0] for key, entry in search.space.items() if entry.of is None}


def own_values(job: JobSpec) -> dict[str, Any] | None:
    """Return the job's values of the searched keys; None if one of them is outside the search space."""
    search = search_of(job)
    bare = job_with(job, search.proxy)
    found = {key: value_at(bare, key) for key, entry in search.space.items() if entry.of is None}
    return found if all(_may_be(search.space[key], value) for key, value in found.items()) else None


def usual_values(job: JobSpec) -> dict[str, Any]:
    """Return values to plan with before a trial is chosen: the job's own, or else the first of the space."""
    return own_values(job) or first_values(search_of(job))


def _may_be(entry: ParameterSpec, value: Any) -> bool:
    if entry.values is not None:
        return value in entry.values
    low, high = entry.ends or (0.0, 0.0)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and low <= value <= high and (entry.int is None or isinstance(value, int))


def value_at(job: JobSpec, key: str) -> Any:
    """Return the job's value at a dotted key, defaults included; None if there is no such key."""
    at: Any = job.model_dump(mode="json")
    for name in key.split("."):
        at = at.get(name) if isinstance(at, dict) else None
    return at


def check_kind(loaded: LoadedJob, *, is_search: bool) -> None:
    """Check that a job is for `forge tune`, or for `forge train`. Raises: JobFileError if it is not."""
    if is_search and loaded.job.search is None:
        problem = "is missing: add it to search, or use forge train"
        raise loaded.source.error("search", problem)
    if not is_search and loaded.job.search is not None:
        problem = "this job is a search over many trials: use forge tune, or remove the section to train one run"
        raise loaded.source.error("search", problem, show_value=False)


def search_of(job: JobSpec) -> SearchSpec:
    """Return the job's search. Raises: JobFileError if it has none."""
    if job.search is None:
        raise JobFileError("is missing: add a section 'search:', or use forge train", key="search")
    return job.search


def check_space(loaded: LoadedJob) -> None:
    """Check that each value of the space is valid for its key, with the first value of every other key.

    Raises: JobFileError for the first value that is not, with its line.
    """
    job = loaded.job
    search = search_of(job)
    for key, value in search.proxy.items():
        _try(loaded, {}, at_key=f"search.proxy.{key}", value=value, only={key: value})
    if search.metric.startswith("eval/") and not job.data.held_out:
        problem = f"{search.metric} is measured on held-out data, but data.held_out is 0"
        raise loaded.source.error("search.metric", problem, show_value=False)
    first = first_values(search)
    for key in first:
        for value in _some_values(search.space[key]):
            _try(loaded, {**first, key: value}, at_key=f"search.space.{key}", value=value, key=key)


def _try(
    loaded: LoadedJob,
    values: Mapping[str, Any],
    *,
    at_key: str,
    value: Any,
    key: str = "",
    only: Mapping[str, Any] | None = None,
) -> None:
    try:
        if only is not None:
            job_with(loaded.job, only)
        else:
            trial_job(loaded.job, values)
    except JobFileError as error:
        found = error.key or ""
        if found.startswith("search."):
            raise loaded.source.error(found, error.problem, show_value=False) from error
        if only is None and not _is_about(found, key):
            followed = loaded.job.search.space.get(found) if loaded.job.search else None
            at_key = f"search.space.{found}" if followed is not None else at_key
        where = "" if _is_about(found, at_key.split(".", 2)[2]) else f"{found} "
        raise loaded.source.error(
            at_key, f"cannot be {value!r}: {where}{error.problem}", nearest=error.nearest, show_value=False
        ) from error


def _is_about(found: str, key: str) -> bool:
    return found == key or key.startswith(f"{found}.")


def _some_values(entry: ParameterSpec) -> tuple[Any, ...]:
    """Return all values of a list, or the bounds of a range."""
    return entry.values if entry.values is not None else entry.ends or ()


def _place(body: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        inner = body.setdefault(section, {})
        if not isinstance(inner, dict):
            problem = f"'{'.'.join(sections[: depth + 1])}' is a value and has no keys below it"
            raise JobFileError(problem, path="search", key=key)
        body = inner
    body[name] = value
