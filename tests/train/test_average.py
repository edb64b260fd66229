"""The averaged (EMA) weights: exact at every ZeRO stage and across resizes, measured on request, and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forge.checkpoint.reader import open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.events import Evaluated
from forge.inference.weights import CheckpointWeights
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan, plan_to_json
from tests.support.jobs import tiny_plan
from tests.support.ranks import on_ranks, run_ranks
from tests.train.test_pretrained import save_first_weights

DECAY = 0.5
RESIZES: list[tuple[int, dict[str, Any]]] = [
    (2, {"stage": 0}), (3, {"stage": 1}), (1, {"stage": 2}), (2, {"stage": 2, "offload": "cpu"}), (2, {"stage": 3}),
    (3, {"stage": 3}),
]  # fmt: skip
"""World size and `training.zero` of each step."""


def weights_of(folder: Path, *, step: int, ema: bool = False) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(open_storage(str(folder)), f"step-{step:08d}")
    return dict(CheckpointWeights(checkpoint, ema=ema).tensors())


def test_average__last_step__has_its_loss_and_the_weights_are_unchanged(corpus: CorpusInfo, tmp_path: Path) -> None:
    changes = {"training__zero": {"stage": 2}, "training__total_steps": 3}
    plain = run_ranks(tiny_plan(corpus, **changes), tmp_path / "plain", world_size=2)
    plan = tiny_plan(corpus, **changes, training__ema={"decay": DECAY})
    averaged = run_ranks(plan, tmp_path / "averaged", world_size=2)
    (event,) = [e for e in averaged.events if isinstance(e, Evaluated) and e.weights == "ema"]
    rows = [step.as_record() for step in averaged.steps]
    assert rows[-1]["eval/ema_loss"] == event.loss != rows[-1]["eval/loss"]
    assert rows[-1]["eval/ema_perplexity"] == pytest.approx(event.metrics["perplexity"])
    assert not any("eval/ema_loss" in row for row in rows[:-1])
    assert averaged.losses == plain.losses
    kept = weights_of(tmp_path / "plain", step=3)
    for name, value in weights_of(tmp_path / "averaged", step=3).items():
        assert torch.equal(value, kept[name]), name


def test_average__evaluate_always__is_measured_at_each_evaluation(corpus: CorpusInfo, tmp_path: Path) -> None:
    changes = {"training__total_steps": 4, "training__evaluate_every": "2 steps"}
    ends = tiny_plan(corpus, **changes, training__ema={"decay": DECAY})
    always = tiny_plan(corpus, **changes, training__ema={"decay": DECAY, "evaluate": "always"})
    expected = run_ranks(ends, tmp_path / "end", world_size=1)
    found = run_ranks(always, tmp_path / "always", world_size=1)
    rows = [step.as_record() for step in found.steps]
    assert [step for step, row in enumerate(rows, start=1) if "eval/ema_loss" in row] == [2, 4]
    assert found.losses == expected.losses
    assert rows[-1]["eval/ema_loss"] == expected.steps[-1].as_record()["eval/ema_loss"]


def initial_weights(rank: int, plan: str) -> dict[str, Any]:
    """The fp32 weights before the first step."""
    from forge.model.families.base import DataShape
    from forge.objective.causal_lm import CausalLm
    from forge.plan.plan import plan_from_json
    from forge.train.engine import build_engine
    from forge.train.process_group import join_process_group

    made = plan_from_json(plan)
    join_process_group(device=torch.device("cpu"))
    engine = build_engine(
        made.job.model, made.job.training, deepspeed_config=made.for_world_size(1).deepspeed,
        data=DataShape.of(made), objective=CausalLm(), device=torch.device("cpu"), has_linear_head=True,
    )  # fmt: skip
    shards = [shard for shard in engine.state.shards if shard.constant is None]
    return {shard.name: engine.state.tensor(shard, "master").tolist() for shard in shards}


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["all but the embedding", "adapters"])
def test_average__resized_at_every_stage__is_the_recurrence_bit_for_bit(
    corpus: CorpusInfo, tmp_path: Path, trained: str
) -> None:
    """`e ← d·e + (1 - d)·w` in fp32 on one rank, over the weights of every step."""
    changes: dict[str, Any] = {"model__freeze": ["model.embed_tokens"]}
    if trained == "adapters":
        pytest.importorskip("peft")
        save_first_weights(tmp_path / "base", "fp32")
        changes = {"model": {"from_pretrained": str(tmp_path / "base"), "lora": {"rank": 2}}}

    def plan(zero: dict[str, Any]) -> Plan:
        return tiny_plan(corpus, **changes, training__zero=zero, training__ema={"decay": DECAY}, checkpoint__keep=9)

    (initial,) = on_ranks(initial_weights, plan_to_json(plan({"stage": 0})), world_size=1)
    expected = {name: torch.tensor(values, dtype=torch.float32) for name, values in initial.items()}
    for step, (world_size, zero) in enumerate(RESIZES, start=1):
        run_ranks(plan(zero), tmp_path, world_size=world_size, stop_after=1)
        decay = min(DECAY, (1 + step) / (10 + step))
        weights, averages = weights_of(tmp_path, step=step), weights_of(tmp_path, step=step, ema=True)
        for name, average in expected.items():
            average.lerp_(weights[name].view(-1), 1 - decay)
            assert torch.equal(averages[name].view(-1), average), (step, name)
    untrained = set(weights) - set(expected)
    assert untrained and all(torch.equal(averages[name], weights[name]) for name in untrained)
