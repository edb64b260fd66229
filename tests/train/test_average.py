"""The averaged (EMA) weights are measured after the last step, and the measurement changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge.checkpoint.reader import open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.events import Evaluated
from forge.plan.inputs import CorpusInfo
from forge.serve.weights import CheckpointWeights
from tests.support.jobs import tiny_plan
from tests.support.ranks import run_ranks


def final_weights(folder: Path, *, step: int) -> dict[str, torch.Tensor]:
    return dict(CheckpointWeights(open_checkpoint(open_storage(str(folder)), f"step-{step:08d}")).tensors())


def test_average__last_step__has_its_loss_and_the_weights_are_unchanged(corpus: CorpusInfo, tmp_path: Path) -> None:
    changes = {"training__zero": {"stage": 2}, "training__total_steps": 3}
    plain = run_ranks(tiny_plan(corpus, **changes), tmp_path / "plain", world_size=2)
    plan = tiny_plan(corpus, **changes, training__ema={"decay": 0.5})
    averaged = run_ranks(plan, tmp_path / "averaged", world_size=2)
    (event,) = [e for e in averaged.events if isinstance(e, Evaluated) and e.weights == "ema"]
    rows = [step.as_record() for step in averaged.steps]
    assert rows[-1]["eval/ema_loss"] == event.loss != rows[-1]["eval/loss"]
    assert rows[-1]["eval/ema_perplexity"] == pytest.approx(event.metrics["perplexity"])
    assert not any("eval/ema_loss" in row for row in rows[:-1])
    assert averaged.losses == plain.losses
    kept = final_weights(tmp_path / "plain", step=3)
    for name, value in final_weights(tmp_path / "averaged", step=3).items():
        assert torch.equal(value, kept[name]), name
