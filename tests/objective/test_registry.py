"""The table of objectives agrees with the classes that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.objective.build import build_objective
from forge.objective.registry import OBJECTIVES
from tests.support.objectives import context_of


@pytest.mark.parametrize("name", OBJECTIVES)
def test_build_objective__every_registered_name__has_the_methods_and_the_metrics(name: str, tmp_path: Path) -> None:
    objective = build_objective(name, context=context_of(tmp_path, objective=name))
    assert objective.metric_directions == OBJECTIVES[name].metrics
    assert all(callable(getattr(objective, method)) for method in ("batch", "loss", "metrics"))
