"""AdamW with moments in 8 bits is bitsandbytes' own, and its state loads at any world size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge.config.optimizer import OptimizerSpec
from forge.plan.inputs import CorpusInfo
from forge.train.optimizer import build_optimizer, reset_state
from tests.support.jobs import tiny_plan
from tests.support.ranks import run_ranks
from tests.train.test_optimizers import assert_equal, stepped, whole_layouts

bitsandbytes = pytest.importorskip("bitsandbytes")


def test_adamw_8bit__reference__is_bitsandbytes() -> None:
    def module() -> torch.nn.Module:
        torch.manual_seed(3)
        return torch.nn.Linear(100, 100)

    own, other = module(), module()
    spec = OptimizerSpec(name="adamw-8bit", weight_decay=0.1)
    optimizer = build_optimizer(own, spec, device=torch.device("cpu"))
    reset_state(optimizer, list(whole_layouts(optimizer)))
    groups = [{"params": [other.weight], "weight_decay": 0.1}, {"params": [other.bias], "weight_decay": 0.0}]
    reference = bitsandbytes.optim.AdamW8bit(groups, betas=(0.9, 0.95))
    assert_equal(stepped(own, optimizer, lr=0.01), stepped(other, reference, lr=0.01))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adamw_8bit__resumed_at_another_world_size__keeps_the_curve(
    corpus: CorpusInfo, tmp_path: Path, precision: str
) -> None:
    plan = tiny_plan(
        corpus, training__optimizer={"name": "adamw-8bit", "lr": 1e-2}, training__zero={"stage": 0},
        training__precision=precision,
    )  # fmt: skip
    whole = run_ranks(plan, tmp_path / "whole", world_size=2).losses
    begun = run_ranks(plan, tmp_path / "cut", world_size=2, stop_after=3).losses
    rest = run_ranks(plan, tmp_path / "cut", world_size=3).losses
    assert begun == whole[:3]
    assert begun + rest == pytest.approx(whole, rel=1e-5 if precision == "fp32" else 5e-3)
