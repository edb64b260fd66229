"""Ownership of the state with real DeepSpeed engines."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.train.state import shards_of
from tests.support.jobs import VOCAB, tiny_plan
from tests.support.ranks import on_ranks

STAGES = [0, 1, 2, 3]


def ownership(rank: int, plan_json: str, world_size: int) -> dict[str, Any]:
    """Return a rank's claims, and the number of elements of its state and parameters."""
    from forge.model.families.base import DataShape
    from forge.objective.causal_lm import CausalLm
    from forge.train.engine import build_engine
    from forge.train.process_group import join_process_group
    from forge.train.snapshot_pieces import pieces_of

    plan: Plan = plan_from_json(plan_json)
    device = torch.device("cpu")
    join_process_group(device=device)
    config = plan.for_world_size(world_size).deepspeed
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = build_engine(
        plan.job.model, plan.job.training, deepspeed_config=config,
        data=DataShape(vocab_size=VOCAB, seq_len=16, eot_id=0), objective=CausalLm(),
        device=device, has_linear_head=True,
    )  # fmt: skip
    state = engine.state
    return {
        "claims": [
            (shard.name, shard.start, shard.stop)
            for shard, kind, _ in pieces_of(state, parts_per_shard=0)[0].part.sources
            if kind in ("master", "buffer")
        ],
        "kinds": {
            kind: sum(state.tensor(shard, kind).numel() for shard in state.shards)
            for kind in ("master", "exp_avg", "exp_avg_sq", "ema")
        },
        "whole_parameters": sum(p.numel() for p in engine._engine.module.parameters()),
    }


@functools.cache
def owners(stage: int, world_size: int) -> list[dict[str, Any]]:
    plan = tiny_plan(training__zero={"stage": stage}, training__ema={"decay": 0.9}, resources__workers="1..5")
    return on_ranks(ownership, plan_to_json(plan), world_size, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_claims__all_ranks__every_element_once(stage: int, world_size: int) -> None:
    sizes = {
        name: sum(stop - start for n, start, stop in owners(0, 1)[0]["claims"] if n == name)
        for name, _, _ in owners(0, 1)[0]["claims"]
    }
    claims = sorted(claim for owner in owners(stage, world_size) for claim in owner["claims"])
    for name, size in sizes.items():
        intervals = [(start, stop) for n, start, stop in claims if n == name and stop > start]
        edges = [0, *(stop for _, stop in intervals)]
        assert [start for start, _ in intervals] == edges[:-1], name
        assert edges[-1] == size, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards__zero_1_to_3__at_most_the_ranks_share(stage: int) -> None:
    whole = owners(0, 1)[0]
    for owner in owners(stage, 4):
        for kind, elements in owner["kinds"].items():
            assert elements <= 1.1 * whole["kinds"][kind] / 4, kind


def test_parameters__zero_3__are_partitioned() -> None:
    assert [owner["whole_parameters"] for owner in owners(3, 2)] == [0, 0]
    assert owners(2, 2)[0]["whole_parameters"] > 0


@pytest.mark.parametrize("stage", [1, 3])
def test_shards_of__unknown_deepspeed_layout__error_names_release(stage: int) -> None:
    engine = SimpleNamespace(
        module=torch.nn.Linear(2, 2),
        optimizer=SimpleNamespace(optimizer=None),
        global_rank=0,
        zero_optimization_stage=lambda: stage,
    )
    with pytest.raises(RuntimeError, match=r"DeepSpeed \(\d.*\) keeps its optimizer state elsewhere than 0\.19\.8"):
        shards_of(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_memory_estimate__matches_state_of_a_rank(stage: int) -> None:
    world_size = 2
    plan = tiny_plan(training__zero={"stage": stage}, training__ema={"decay": 0.9}, resources__workers="1..5")
    estimate = plan.for_world_size(world_size).memory
    real = owners(stage, world_size)[0]
    assert 4 * sum(real["kinds"].values()) == pytest.approx(estimate.optimizer_bytes + estimate.ema_bytes, rel=0.05)
    if stage < 3:
        assert 2 * real["whole_parameters"] == pytest.approx(estimate.weights_bytes, rel=0.01)
