"""A model with a state that is hard to shard, on real DeepSpeed engines: odd sizes, a frozen layer, tied weights,
buffers of two types, parameters smaller than the number of ranks."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from forge.plan.batch import plan_batch
from forge.plan.deepspeed_config import deepspeed_config
from forge.plan.rank_groups import NO_GROUPS, RankGroups
from forge.train.shard import Shard
from forge.train.state import TrainState
from tests.support.jobs import tiny_job

VARIANTS: dict[str, dict[str, Any]] = {
    "zero 0": {"stage": 0},
    "zero 1": {"stage": 1},
    "zero 2": {"stage": 2},
    "zero 2 offload": {"stage": 2, "offload": "cpu"},
    "zero 3": {"stage": 3},
    "zero 3 persistent": {"stage": 3},
    "zero 3 offload": {"stage": 3, "offload": "cpu"},
    "zero 3 hpz": {"stage": 3},
    "zero 1 groups": {"stage": 1},
    "zero 2 groups": {"stage": 2},
    "zero 3 groups": {"stage": 3},
}
"""Values of `training.zero`; with `persistent`, small parameters are not divided; with `hpz`, in the largest groups
that are smaller than the world size, or in one of all ranks; with `groups`, in the smallest shard groups of two or
more ranks."""

MATRIX = ["zero 0", "zero 1", "zero 2", "zero 2 offload", "zero 3"]
"""Variants tested at every world size; the others hold the same vectors in other places."""


def groups_of(variant: str, *, world_size: int) -> RankGroups:
    """The groups of a variant."""
    divisors = [size for size in range(2, world_size) if world_size % size == 0] or [world_size]
    if variant.endswith("hpz"):
        return RankGroups(hpz_partition_size=divisors[-1])
    return RankGroups(num_shard_groups=world_size // divisors[0]) if variant.endswith("groups") else NO_GROUPS


class OddModel(nn.Module):
    """Predicts a token from a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 11)
        self.norm = nn.LayerNorm(11)
        self.body = nn.Linear(11, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def finish(self) -> OddModel:
        """Tie and freeze parameters, after a construction that may divide them."""
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)
        return self

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.norm(self.frozen(self.embedding(tokens)))
        return nn.functional.cross_entropy(self.head(self.body(hidden)).float(), targets)


def odd_state(variant: str, *, world_size: int, precision: str = "bf16") -> TrainState:
    """The state of a new engine; collective."""
    import deepspeed

    from forge.train.optimizer import build_optimizer
    from forge.train.shard_groups import ShardGroups
    from forge.train.zero3 import sharding_of

    training = tiny_job(training__zero=VARIANTS[variant], training__precision=precision).training
    batch = plan_batch(world_size, world_size=world_size, max_micro_batch_size=1)
    groups = groups_of(variant, world_size=world_size)
    config = deepspeed_config(training, batch, groups=groups)
    shard_groups = ShardGroups.join(groups.num_shard_groups)
    deepspeed.utils.groups.mpu = None  # of the engine before
    if variant in ("zero 3", "zero 3 hpz", "zero 3 groups"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    divided = training.zero.stage == 3
    with sharding_of(config, shard_groups=shard_groups).construct() if divided else contextlib.nullcontext():
        model = OddModel()
    model.finish()
    optimizer = build_optimizer(model, training.optimizer, device=torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=shard_groups, config=config)
    return TrainState(engine, keep_average=True, num_groups=groups.num_shard_groups)


def pattern(shard: Shard, kind: str, dtype: torch.dtype) -> Tensor:
    """Elements computed from name, kind and index: the expected content of a shard, whichever rank wrote it."""
    positions = torch.arange(shard.start, shard.stop, dtype=torch.int64)
    hashed = (positions * 2654435761 + zlib.crc32(f"{kind}/{shard.name}".encode())) % 1_000_003
    return hashed.to(dtype) if not dtype.is_floating_point else (hashed.double() / 1_000_003).to(dtype)


def write_pattern(state: TrainState, *, zero: bool = False) -> None:
    """Fill all tensors that a rank holds."""
    for shard in state.shards:
        for kind in state.kinds_of(shard):
            tensor = state.tensor(shard, kind)
            tensor.zero_() if zero else tensor.copy_(pattern(shard, kind, tensor.dtype))


def differing(state: TrainState) -> list[str]:
    """The tensors of a rank that are not bit-identical to the expected content."""
    found = []
    for shard in state.shards:
        for kind in state.kinds_of(shard):
            tensor = state.tensor(shard, kind)
            if not torch.equal(tensor, pattern(shard, kind, tensor.dtype)):
                found.append(f"{kind} of {shard.name}[{shard.start}:{shard.stop}]")
    return found
