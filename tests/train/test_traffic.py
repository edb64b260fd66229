"""Bytes that a rank sends in a step and holds of the state, counted on real ranks, against the plan's formulas."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.plan.inputs import CorpusInfo
from tests.support.rank_costs import LAYOUTS, RankLayout, rank_costs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.world_size} ranks, {layout}")
def test_rank_costs__every_layout__are_those_of_the_plan(
    corpus: CorpusInfo, tmp_path: Path, layout: RankLayout
) -> None:
    costs = {cost.name: cost for cost in rank_costs(layout, corpus, tmp_path)}
    assert costs["sent, exchanged"].planned > 0 or layout.degree == 1
    assert {name: cost.counted for name, cost in costs.items()} == {
        name: pytest.approx(cost.planned, rel=0.05) for name, cost in costs.items()
    }
