"""Convert a trial's values between the job and Ray Tune's schedulers. Pure.

`pb2` needs values in [0, 1]: each becomes its relative position in its range, on a logarithmic scale for
`loguniform`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from forge.config.search import ParameterSpec, SearchSpec

FIRST_START_KEYS = ("reported", "replay", "value", "exploited")
"""Keys of a trial's Tune config that apply to its first start only; see `TrialTrainable`."""


def config_values(values: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """A trial's values as its scheduler needs them."""
    if search.scheduler.kind != "pb2":
        return dict(values)
    return {key: _to_unit(search.space[key], value) for key, value in values.items()}


def plain_values(values: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """The inverse of `config_values`: values as the job needs them."""
    if search.scheduler.kind != "pb2":
        return dict(values)
    return within({key: _from_unit(search.space[key], share) for key, share in values.items()}, search)


def searched(search: SearchSpec) -> dict[str, ParameterSpec]:
    """The keys that are searched, without those that are computed from others."""
    return {key: entry for key, entry in search.space.items() if entry.of is None}


def within(values: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """Values clipped to their ranges: a population's perturbation may leave them."""
    found = dict(values)
    for key, entry in searched(search).items():
        if entry.ends is not None:
            low, high = entry.ends
            found[key] = min(max(found[key], low), high)
    return found


def _to_unit(entry: ParameterSpec, value: float) -> float:
    low, high = _scale_ends(entry)
    at = math.log(value) if entry.loguniform is not None else value
    return (at - low) / (high - low)


def _from_unit(entry: ParameterSpec, share: float) -> float:
    low, high = _scale_ends(entry)
    at = low + (high - low) * share
    if entry.int is not None:
        return round(at)
    return math.exp(at) if entry.loguniform is not None else at


def _scale_ends(entry: ParameterSpec) -> tuple[float, float]:
    assert entry.ends is not None, "SearchSpec holds that pb2 has ranges"
    low, high = entry.ends
    return (math.log(low), math.log(high)) if entry.loguniform is not None else (low, high)
