"""The training state in coordinates that know nothing of ranks.

A rank owns *shards*: intervals `[start, stop)` of a parameter's flattened elements, each in several
kinds: `master` (the fp32 weight), `exp_avg`, `exp_avg_sq` (AdamW's moments), `ema`. Whoever saves
writes what it owns; whoever loads reads what it owns now. How DeepSpeed lays the state out is known
to this module alone, by names that are not part of its public interface; `shards_of` therefore
checks that what it found covers every parameter, and says which release it was written for.

    ZeRO 0       bf16: one fp32 tensor per parameter, whole on every rank; fp32: the parameter itself
    ZeRO 1, 2    one flat fp32 vector per parameter group and rank; `_hp_mapping` locates a parameter in it
    ZeRO 3       one flat fp32 vector per sub-group and rank; `grad_position` locates a parameter in it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("master", "exp_avg", "exp_avg_sq")
_KNOWN_RELEASE = "0.19.8"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shard:
    """One interval of one parameter, and where this rank keeps it.

    `owner` is the tensor the optimizer updates; the interval lies in it from `offset` on, and at the
    same place in every tensor of `owner`'s size (its moments, its average).
    """

    name: str
    start: int
    stop: int
    owner: Tensor
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """The interval within a tensor laid out like `owner`; writing to it writes through."""
        return flat.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


class TrainState:
    """Read and write access to a DeepSpeed engine's optimizer state, shard by shard."""

    def __init__(self, engine: Any, *, keep_average: bool) -> None:
        """Args:
        engine: the DeepSpeed engine, right after `deepspeed.initialize`.
        keep_average: keep an exponential moving average beside the master weights.
        """
        self._engine = engine
        self._torch_optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.shards = shards_of(engine)
        """What this rank must load: all that it keeps."""
        self.claims = [_claim(shard, engine) for shard in self.shards] if _is_replicated(engine) else self.shards
        """What this rank must save: over all ranks, every element once."""
        self._owners = list({id(shard.owner): shard.owner for shard in self.shards}.values())
        self._reset_moments()
        self._averages = {id(owner): owner.detach().clone() for owner in self._owners} if keep_average else {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds this run keeps."""
        return (*KINDS, "ema") if self._averages else KINDS

    def tensor(self, shard: Shard, kind: str) -> Tensor:
        """The flat fp32 elements of one shard in one kind; a view, not a copy."""
        if kind == "master":
            return shard.view(shard.owner)
        if kind == "ema":
            return shard.view(self._averages[id(shard.owner)])
        return shard.view(self._torch_optimizer.state[shard.owner][kind])

    @torch.no_grad()
    def update_average(self, *, decay: float, step: int) -> None:
        """`ema ← d · ema + (1 - d) · master` on what this rank owns, with `d = min(decay, (1 + t) / (10 + t))`.

        The smaller decay of the first steps t lets the average forget the random weights it began with.

        Source: `num_updates` of TensorFlow's ExponentialMovingAverage.
        """
        decay = min(decay, (1 + step) / (10 + step))
        for owner in self._owners:
            self._averages[id(owner)].lerp_(owner.detach(), 1 - decay)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange weights and average, so that the model computes with the average until swapped back."""
        for owner in self._owners:
            average = self._averages[id(owner)]
            weights = owner.detach().clone()
            owner.detach().copy_(average)
            average.copy_(weights)
        self.refresh_weights()

    @torch.no_grad()
    def set_step(self, step: int) -> None:
        """Tell AdamW how many updates it has made; its bias correction depends on it."""
        for owner in self._owners:
            self._torch_optimizer.state[owner]["step"].fill_(float(step))

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Recompute what the model calculates with from the master weights; collective."""
        optimizer = self._engine.optimizer
        stage = self._engine.zero_optimization_stage()
        if stage == 3:
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # Small parameters are kept whole on every rank; make them anew from the shards.
            persistent = [p for p in self._engine.module.parameters() if getattr(p, "ds_persist", False)]
            if persistent:
                for parameter in persistent:
                    parameter.partition()
                persistent[0].all_gather(persistent)
        elif stage > 0:
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                torch._foreach_copy_([p.data for p in low], [p.detach() for p in high])

    @torch.no_grad()
    def _reset_moments(self) -> None:
        """Give AdamW the state it would otherwise make at its first step, at step 0.

        DeepSpeed's bf16 optimizer of ZeRO 0 makes one empty step when it is built, which would count
        as the first in the bias correction.
        """
        for owner in self._owners:
            state = self._torch_optimizer.state[owner]
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = torch.zeros_like(owner, dtype=torch.float32, requires_grad=False)
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device)


def shards_of(engine: Any) -> list[Shard]:
    """What this rank owns of each parameter, in the order of `named_parameters`.

    Raises: RuntimeError if a release of DeepSpeed keeps its state elsewhere.
    """
    named = [(name.removeprefix("model."), p) for name, p in engine.module.named_parameters() if p.requires_grad]
    stage = engine.zero_optimization_stage()
    try:
        if stage == 3:
            shards = list(_partitioned(engine, named))
        elif stage > 0:
            shards = list(_flattened(engine, named))
        else:
            shards = list(_whole(engine, named))
    except AttributeError as error:
        raise RuntimeError(_moved(f"ZeRO {stage}: {error}")) from error
    for shard in shards:
        if shard.view(shard.owner).numel() != shard.stop - shard.start or shard.owner.dtype != torch.float32:
            raise RuntimeError(_moved(f"ZeRO {stage}: {shard.name} is not where it should be"))
    return shards


def _is_replicated(engine: Any) -> bool:
    return bool(engine.zero_optimization_stage() == 0)


def _claim(shard: Shard, engine: Any) -> Shard:
    """The W-th part of what every rank has whole."""
    world, rank, size = engine.dp_world_size, engine.global_rank, shard.stop
    start, stop = rank * size // world, (rank + 1) * size // world
    return Shard(name=shard.name, start=start, stop=stop, owner=shard.owner, offset=start)


def _whole(engine: Any, named: list[tuple[str, Any]]) -> Iterator[Shard]:
    groups = getattr(engine.optimizer, "fp32_groups", None)
    masters: dict[int, Tensor] = {}
    if groups is not None:
        for low, high in zip(engine.optimizer.fp16_groups, groups, strict=True):
            masters |= {id(p): master for p, master in zip(low, high, strict=True)}
    for name, parameter in named:
        owner = masters[id(parameter)] if masters else parameter
        yield Shard(name=name, start=0, stop=owner.numel(), owner=owner, offset=0)


def _flattened(engine: Any, named: list[tuple[str, Any]]) -> Iterator[Shard]:
    optimizer = engine.optimizer
    for name, parameter in named:
        mapping = parameter._hp_mapping
        if mapping is None:  # wholly on other ranks
            continue
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        yield Shard(name=name, start=start, stop=start + size, owner=flat, offset=mapping.hp_fragment_address.start)


def _partitioned(engine: Any, named: list[tuple[str, Any]]) -> Iterator[Shard]:
    optimizer, rank = engine.optimizer, engine.global_rank
    for name, parameter in named:
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * parameter.partition_numel()
        stop = min(start + parameter.partition_numel(), parameter.ds_numel)
        if start < stop:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield Shard(name=name, start=start, stop=stop, owner=flat, offset=offset)


def _moved(what: str) -> str:
    import deepspeed

    return (
        f"this release of DeepSpeed ({deepspeed.__version__}) keeps its optimizer state elsewhere than "
        f"{_KNOWN_RELEASE}, for which forge.train.state was written: {what}"
    )
