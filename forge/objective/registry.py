"""The class of `training.objective`: a built-in one by its name, or the user's."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import cast

from forge.config.registry import OBJECTIVES, Direction
from forge.errors import UserCodeError
from forge.objective.base import Objective
from forge.user_code import is_reference, load_class, split_reference

_TAKEN = frozenset({"loss", "learning_rate", "grad_norm", "tokens"})


def build_objective(name: str) -> Objective:
    """Build an objective.

    Args:
        name: of the registry, or `module:Class` in the code folder in use.

    Raises: UserCodeError if the user's class cannot be imported, lacks a method, or cannot be built.
    """
    if not is_reference(name):
        module, cls = split_reference(OBJECTIVES[name])
        return cast(Objective, getattr(importlib.import_module(module), cls)())
    found = load_class(name, base=Objective)
    require_directions(name, found)
    return cast(Objective, found())


def require_directions(name: str, found: type) -> Mapping[str, Direction]:
    """Return the `metric_directions` of a user's objective.

    Args:
        name: its `module:Class`.

    Raises: UserCodeError if it has none, or names a metric that every run has.
    """
    directions = getattr(found, "metric_directions", None)
    if not isinstance(directions, dict) or not set(directions.values()) <= {"min", "max"}:
        raise UserCodeError(f"{name}: metric_directions must map the name of each metric to 'min' or 'max'")
    taken = sorted(set(directions) & _TAKEN)
    if taken:
        raise UserCodeError(f"{name}: metric_directions must not name {taken[0]!r}, which every run reports")
    return directions
