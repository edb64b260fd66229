"""Build the objective of a job: a built-in one by its name, or the user's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import cast

from forge.errors import UserCodeError
from forge.objective.base import RESERVED_METRICS, Objective, ObjectiveContext
from forge.objective.registry import OBJECTIVES, Direction
from forge.user_code import is_reference, load_builtin_class, load_class, user_code_errors

_METRIC_NAME = re.compile("[a-z][a-z0-9_]*")


def build_objective(name: str, *, context: ObjectiveContext | None = None) -> Objective:
    """Build an objective.

    Args:
        name: of the registry, or `module:Class` in the code folder in use.
        context: passed to a built-in class whose constructor has a parameter of this name.

    Raises: UserCodeError if the user's class cannot be imported, lacks a method, or cannot be built.
    """
    if not is_reference(name):
        cls = load_builtin_class(OBJECTIVES[name].reference)
        takes_context = "context" in inspect.signature(cls).parameters
        return cast(Objective, cls(context=context) if takes_context else cls())
    found = load_class(name, base=Objective)
    with user_code_errors(name):
        require_directions(name, found)
        built = found()
        require_directions(name, built)
    return cast(Objective, built)


def require_directions(name: str, found: object) -> Mapping[str, Direction]:
    """Return the `metric_directions` of a user's objective.

    Args:
        name: its `module:Class`.
        found: the class or an instance.

    Raises: UserCodeError if it has none, names a metric that every run has, or has a name that is not plain.
    """
    directions = getattr(found, "metric_directions", None)
    # Compared in a tuple, as a value may be unhashable.
    if not isinstance(directions, Mapping) or any(value not in ("min", "max") for value in directions.values()):
        raise UserCodeError(f"{name}: metric_directions must map the name of each metric to 'min' or 'max'")
    for metric in directions:
        if not isinstance(metric, str) or not _METRIC_NAME.fullmatch(metric):
            raise UserCodeError(
                f"{name}: metric_directions names {metric!r}; "
                "a name must have only a-z, 0-9 and _, and begin with a-z"
            )
        if metric in RESERVED_METRICS:
            raise UserCodeError(f"{name}: metric_directions must not name {metric!r}, which every run reports")
    return dict(directions)
