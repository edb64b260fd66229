"""The class of `training.objective`: a built-in one by its name, or the user's."""

from __future__ import annotations

import importlib
from typing import cast

from forge.config.registry import OBJECTIVES
from forge.errors import UserCodeError
from forge.objective.base import Objective
from forge.user_code import is_reference, load_class, split_reference


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
    directions = getattr(found, "metric_directions", None)
    if not isinstance(directions, dict) or not set(directions.values()) <= {"min", "max"}:
        raise UserCodeError(f"{name}: metric_directions must map the name of each metric to 'min' or 'max'")
    if "loss" in directions:
        raise UserCodeError(f"{name}: metric_directions must not name 'loss', which every objective has")
    return cast(Objective, found())
