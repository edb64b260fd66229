"""The table of objectives agrees with the classes that it names."""

from __future__ import annotations

import pytest

from forge.objective.build import build_objective
from forge.objective.registry import OBJECTIVES


@pytest.mark.parametrize("name", OBJECTIVES)
def test_build_objective__every_registered_name__has_the_methods_and_the_metrics(name: str) -> None:
    objective = build_objective(name)
    assert objective.metric_directions == OBJECTIVES[name].metrics
    assert all(callable(getattr(objective, method)) for method in ("batch", "loss", "metrics"))
