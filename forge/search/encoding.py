"""A trial's values between the job and Ray Tune's schedulers, which may want them otherwise. Pure.

`pb2` models a box: each value is where it lies in its range, from 0 to 1, by orders of magnitude where it was
drawn so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from forge.config.search import ParameterSpec, SearchSpec

ONCE = ("reported", "replay", "value", "moved")
"""Keys of a trial's config that hold for its first start alone."""


def config_values(values: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """A trial's values as its scheduler has them: for `pb2`, where each lies in its range, from 0 to 1."""
    if search.scheduler.kind != "pb2":
        return dict(values)
    return {key: _share(search.space[key], value) for key, value in values.items()}


def plain_values(values: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """And as the job has them."""
    if search.scheduler.kind != "pb2":
        return dict(values)
    return within({key: _at(search.space[key], share) for key, share in values.items()}, search)


def searched(search: SearchSpec) -> dict[str, ParameterSpec]:
    """The keys that are searched; others follow from them."""
    return {key: entry for key, entry in search.space.items() if entry.of is None}


def within(values: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """Values that a factor has taken out of their range, at its end."""
    found = dict(values)
    for key, entry in searched(search).items():
        if entry.ends is not None:
            low, high = entry.ends
            found[key] = min(max(found[key], low), high)
    return found


def _share(entry: ParameterSpec, value: float) -> float:
    low, high = _scaled(entry)
    at = math.log(value) if entry.loguniform is not None else value
    return (at - low) / (high - low)


def _at(entry: ParameterSpec, share: float) -> float:
    low, high = _scaled(entry)
    at = low + (high - low) * share
    if entry.int is not None:
        return round(at)
    return math.exp(at) if entry.loguniform is not None else at


def _scaled(entry: ParameterSpec) -> tuple[float, float]:
    assert entry.ends is not None, "SearchSpec holds that pb2 has ranges"
    low, high = entry.ends
    return (math.log(low), math.log(high)) if entry.loguniform is not None else (low, high)
