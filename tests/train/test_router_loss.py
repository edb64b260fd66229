"""Training a mixture of experts: its auxiliary loss counts, equally on any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.plan.inputs import CorpusInfo
from tests.support.jobs import tiny_plan
from tests.support.ranks import Recording, run_ranks

MIXTRAL: dict[str, Any] = {
    "architecture": "mixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True,
    "router_aux_loss_coef": 1.0,
}  # fmt: skip


def train(corpus: CorpusInfo, folder: Path, *, world_size: int, coefficient: float = 1.0, **keys: Any) -> Recording:
    plan = tiny_plan(
        corpus,
        model=MIXTRAL | {"router_aux_loss_coef": coefficient},
        training__total_steps=3,
        training__precision="fp32",
        **keys,
    )
    return run_ranks(plan, folder, world_size=world_size)


def test_train__experts__the_loss_and_its_auxiliary_part_do_not_depend_on_the_workers(
    corpus: CorpusInfo, tmp_path: Path
) -> None:
    one = train(corpus, tmp_path / "1", world_size=1)
    three = train(corpus, tmp_path / "3", world_size=3, training__cross_entropy="plain")
    without = train(corpus, tmp_path / "0", world_size=2, coefficient=0.0)
    assert three.losses == pytest.approx(one.losses, rel=1e-5)
    parts = [[step.extra["train/router_aux_loss"] for step in run.steps] for run in (one, three, without)]
    assert parts[1] == pytest.approx(parts[0], rel=1e-4)
    assert one.losses[0] - without.losses[0] == pytest.approx(parts[0][0], rel=1e-3)
    assert parts[0][0] == pytest.approx(parts[2][0], rel=1e-5)
    assert one.losses[1:] != without.losses[1:]
