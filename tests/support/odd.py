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
}
"""Values of `training.zero`; with `persistent`, small parameters are not divided; with `hpz`, in the largest groups
that are smaller than the world size, or in one of all ranks."""

MATRIX = [name for name in VARIANTS if name not in ("zero 3 persistent", "zero 3 offload", "zero 3 hpz")]
"""Variants tested at every world size; the others hold the same vectors in other places."""


def group_of_hpz(variant: str, *, world_size: int) -> int:
    """The largest proper divisor of a number of ranks, or that number if it is prime; 1 in other variants."""
    if not variant.endswith("hpz"):
        return 1
    return max((size for size in range(2, world_size) if world_size % size == 0), default=world_size)


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
    from forge.train.zero3 import sharding_of

    training = tiny_job(training__zero=VARIANTS[variant], training__precision=precision).training
    batch = plan_batch(world_size, world_size=world_size, max_micro_batch_size=1)
    group = group_of_hpz(variant, world_size=world_size)
    config = deepspeed_config(training, batch, hpz_partition_size=group)
    if variant in ("zero 3", "zero 3 hpz"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    divided = training.zero.stage == 3
    with sharding_of(config).construct() if divided else contextlib.nullcontext():
        model = OddModel()
    model.finish()
    optimizer = build_optimizer(model, training.optimizer, device=torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return TrainState(engine, keep_average=True)


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
