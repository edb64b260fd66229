"""Where the shards of all ranks are within the tensors that an optimizer steps on.

Optimizers that need whole matrices, or sums over their rows, get the layout of each of these tensors: the pieces of
every parameter, in an order that is the same on every rank, also of those of which this rank has nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from forge.plan.parameter_groups import Algorithm
from forge.train.model_shape import named_parameters
from forge.train.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatPiece:
    """The part of one parameter in a tensor of the optimizer: elements `[start, stop)`, from `offset` on."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    ranges: tuple[tuple[int, int], ...]
    """`[start, stop)` of every rank of the layout's group."""

    @property
    def numel(self) -> int:
        """Of the whole parameter."""
        return int(torch.Size(self.shape).numel())

    def view(self, flat: Tensor) -> Tensor:
        """Return the piece in a tensor with this layout, as a flat view."""
        return flat.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlatLayout:
    """One tensor that the optimizer steps on."""

    owner: Tensor
    algorithm: Algorithm
    pieces: tuple[FlatPiece, ...]
    is_whole: bool
    """Whether every rank has all of it (ZeRO 0, or one rank)."""
    group: Any
    """Of torch.distributed: the ranks that have the other pieces."""
    device: torch.device
    """Where the ranks communicate; with offload the tensor itself is in host memory."""


def layouts_of(engine: Any, shards: Iterable[Shard]) -> list[FlatLayout]:
    """Return the layout of each tensor that the optimizer steps on, in the order of its steps; collective."""
    stage = engine.zero_optimization_stage()
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named_parameters(engine.module)}
    own = {shard.name: shard for shard in shards}
    every: list[dict[str, tuple[int, int]]] = [{}] * engine.dp_world_size
    group = engine.data_parallel_group
    dist.all_gather_object(every, {name: (shard.start, shard.stop) for name, shard in own.items()}, group=group)
    layouts = []
    for owner, settings, names in _owners_of(engine):
        pieces = tuple(
            FlatPiece(
                name=name,
                shape=shapes[name],
                start=own[name].start if name in own else 0,
                stop=own[name].stop if name in own else 0,
                offset=own[name].offset if name in own else 0,
                ranges=tuple(ranges.get(name, (0, 0)) for ranges in every),
            )
            for name in names
        )
        layouts.append(
            FlatLayout(
                owner=owner,
                algorithm=settings["algorithm"],
                pieces=pieces,
                is_whole=stage == 0 or len(every) == 1,
                group=group,
                device=engine.device,
            )
        )
    return layouts


def _owners_of(engine: Any) -> Iterator[tuple[Tensor, dict[str, Any], list[str]]]:
    """Yield each tensor that the optimizer steps on, its parameter group, and the names of its parameters."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    if stage == 3:
        names = {id(parameter): name for name, parameter in named_parameters(engine.module)}
        for i, owner in enumerate(optimizer.fp32_partitioned_groups_flat):
            group = groups[optimizer.sub_group_to_group_id[i]]
            yield owner, group, [names[id(parameter)] for parameter in optimizer.fp16_groups[i]]
    elif stage > 0:
        for owner, group in zip(optimizer.single_partition_of_fp32_groups, groups, strict=True):
            yield owner, group, group["param_names"]
    else:
        for group in groups:
            for owner, name in zip(group["params"], group["param_names"], strict=True):
                yield owner, group, [name]
