"""Training state in rank-independent coordinates.

A rank owns *shards*: intervals `[start, stop)` of a parameter's flattened elements, each in several kinds:
`master` (the fp32 weight), the optimizer's (AdamW's `exp_avg` and `exp_avg_sq`) and `ema` of what is trained;
`frozen` of a parameter that is not trained, and `buffer` of a tensor that is not a parameter, both with the
model's type; `base` of a parameter that is not trained and was read from pretrained weights, to which a checkpoint
refers instead of storing it. Saving writes the shards that a rank claims, loading reads the shards that it owns.
Only this module and `flat_layout` depend on DeepSpeed's layout of the state, through private names; `shards_of`
therefore checks the sizes and types it found, and its error names the release it was written for.

    ZeRO 0       bf16: one fp32 tensor per parameter, whole on every rank; fp32: the parameter itself
    ZeRO 1, 2    one flat fp32 vector per parameter group and rank; `_hp_mapping` locates a parameter in it
    ZeRO 3       one flat fp32 vector per sub-group and rank; `grad_position` locates a parameter in it;
                 a frozen parameter's share is its `ds_tensor`
    hpZ          as ZeRO 3; `ds_secondary_tensor`, the rank's share of its group's copy of the weights, is no state
    groups       as the stage, over the ranks of a shard group
    offload      the same vectors, in host memory
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from forge.checkpoint.intervals import Interval, Layout, pack
from forge.checkpoint.manifest import BaseWeights
from forge.errors import CheckpointError
from forge.train.flat_layout import layouts_of
from forge.train.model_shape import DTYPE_NAMES, named_buffers, named_parameters, shape_of
from forge.train.optimizer import STATE_KINDS, replicated_state, reset_state, set_step
from forge.train.shard import Shard
from forge.train.zero3 import drop_second_copies

_KNOWN_RELEASE = "0.19.8"
# Size of a read into host memory where the state is not on the host.
_STAGING_BYTES = 64 * 2**20


class Readable(Protocol):
    """A state written at any world size and ZeRO stage, in storage or in memory."""

    def read(self, wanted: Iterable[tuple[Interval, memoryview]]) -> None:
        """Fill each view with the bytes of its interval. Raises: CheckpointError."""


class WeightSource(Protocol):
    """Initial weights, by parameter."""

    def __contains__(self, name: str) -> bool:
        """Whether a parameter or buffer is available."""

    def read_into(self, name: str, out: Tensor, *, start: int = 0) -> None:
        """Fill a flat tensor with elements from `start` on, converted to its type. Raises: OSError, EOFError."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedPart:
    """A part of the state that a rank copies to host memory."""

    layout: Layout
    """Of a snapshot: the intervals of the part."""
    sources: tuple[tuple[Shard, str, int], ...]
    """Each interval's shard, kind, and offset in the snapshot in bytes."""


class TrainState:
    """Read and write access to a DeepSpeed engine's training state, shard by shard."""

    def __init__(
        self, engine: Any, *, keep_average: bool, base: BaseWeights | None = None, num_groups: int = 1
    ) -> None:
        """Args:
        engine: the DeepSpeed engine, right after `deepspeed.initialize`.
        keep_average: keep an exponential moving average beside the master weights.
        base: the pretrained weights that parameters which are not trained are read from by `load_base`; snapshots
            and checkpoints do not contain them. None: the parameters are stored as kind `frozen`.
        num_groups: groups of ranks that each hold the whole state.
        """
        self._engine, self.rank, self.num_groups = engine, dist.get_rank(), num_groups
        self.shard_group_size = dist.get_world_size() // num_groups
        """Ranks among which the state is divided."""
        self._torch_optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        trained = shards_of(engine)
        layouts = layouts_of(engine, trained)
        reset_state(self._torch_optimizer, layouts)
        self._state_kinds = {id(layout.owner): STATE_KINDS[layout.algorithm] for layout in layouts}
        replicated = [
            Shard(
                name=name, start=0, stop=tensor.numel(), owner=tensor, offset=0, constant=kind, is_replicated=True
            )
            for name, kind, tensor in replicated_state(self._torch_optimizer, layouts)
        ]
        constants = list(_constants(engine, frozen="frozen" if base is None else "base"))
        self.shards = trained + replicated + [shard for shard in constants if shard.constant != "base"]
        """Shards this rank loads from a checkpoint."""
        self.base_shards = [shard for shard in constants if shard.constant == "base"]
        """Shards this rank loads from the base weights."""
        self._owners = list({id(shard.owner): shard.owner for shard in trained}.values())
        self._averages = {id(owner): owner.detach().clone() for owner in self._owners} if keep_average else {}
        self.shape = shape_of(engine, base=base)
        """The tensors of the model; equal on every rank."""

    @property
    def device(self) -> torch.device:
        """Where the ranks compute."""
        device: torch.device = self._engine.device
        return device

    def part(self, number: int, *, of: int, has_buffers: bool) -> SavedPart:
        """Return one of several parts of what this rank holds.

        Args:
            number: of the part, from 0.
            has_buffers: with the buffers, which may differ between ranks, so that rank 0 alone saves its own.
        """
        shards = [self._divided(shard, number=number, of=of) for shard in self.shards if shard.constant != "buffer"]
        return self._saved(shards + (self._buffers() if has_buffers else []))

    def buffers_part(self) -> SavedPart:
        """Return the part of the buffers alone."""
        return self._saved(self._buffers())

    def _saved(self, shards: list[Shard]) -> SavedPart:
        saved = {(shard.name, kind): (shard, kind) for shard in shards for kind in self.kinds_of(shard)}
        layout = pack(self.interval(*pair) for pair in saved.values())
        offsets = ((saved[interval.name, interval.kind], at) for interval, at in layout.with_offsets())
        return SavedPart(layout=layout, sources=tuple((*pair, at) for pair, at in offsets))

    def _buffers(self) -> list[Shard]:
        return [shard for shard in self.shards if shard.constant == "buffer"]

    def _divided(self, shard: Shard, *, number: int, of: int) -> Shard:
        """Return one part of a shard; of a tensor that all ranks of a group have whole, one for each of them."""
        stage = self._engine.zero_optimization_stage()
        if stage == 0 or shard.is_replicated or (stage < 3 and shard.constant is not None):
            rank = dist.get_rank(self._engine.data_parallel_group)
            number, of = rank * of + number, self.shard_group_size * of
        size = shard.stop - shard.start
        return shard.narrow(shard.start + number * size // of, shard.start + (number + 1) * size // of)

    def kinds_of(self, shard: Shard) -> tuple[str, ...]:
        """Return the kinds of a shard in this run."""
        if shard.constant is not None:
            return (shard.constant,)
        kinds = ("master", *self._state_kinds[id(shard.owner)])
        return (*kinds, "ema") if self._averages else kinds

    def interval(self, shard: Shard, kind: str) -> Interval:
        """Return the interval of a shard in one kind."""
        dtype = DTYPE_NAMES[self.tensor(shard, kind).dtype]
        return Interval(kind=kind, name=shard.name, start=shard.start, stop=shard.stop, dtype=dtype)

    def tensor(self, shard: Shard, kind: str) -> Tensor:
        """Return the flat elements of a shard in one kind, as a view."""
        if kind == "master" or shard.constant is not None:
            return shard.view(shard.owner)
        if kind == "ema":
            return shard.view(self._averages[id(shard.owner)])
        return shard.view(self._torch_optimizer.state[shard.owner][kind])

    @torch.no_grad()
    def copy_to(self, memory: memoryview, *, part: SavedPart, buffers: bool) -> None:
        """Copy a part to host memory, in the order of its layout; of a GPU asynchronously in the current stream, if
        the memory is page-locked.

        Args:
            buffers: True: copy only buffers, which a forward pass may change; False: copy everything else.
        """
        for shard, kind, at in part.sources:
            if (kind == "buffer") == buffers:
                source = self.tensor(shard, kind)
                torch.frombuffer(memory, dtype=source.dtype, count=source.numel(), offset=at).copy_(
                    source, non_blocking=True
                )

    @torch.no_grad()
    def read(self, checkpoint: Readable) -> None:
        """Load this rank's shards from a checkpoint of any world size and ZeRO stage; call `resume` afterwards.

        Only the ranges that this rank needs are read, directly into its tensors if they are on the host.
        Raises: CheckpointError if it is of another model, or cannot be read.
        """
        wanted = [
            (shard, kind) for shard in self.shards for kind in self.kinds_of(shard) if shard.stop > shard.start
        ]
        on_host = [pair for pair in wanted if self.tensor(*pair).device.type == "cpu"]
        checkpoint.read((self.interval(*pair), bytes_of(self.tensor(*pair))) for pair in on_host)
        for shard, kind in wanted:
            if self.tensor(shard, kind).device.type != "cpu":
                self._read_staged(checkpoint, shard, kind)

    def _read_staged(self, checkpoint: Readable, shard: Shard, kind: str) -> None:
        numel = _STAGING_BYTES // self.tensor(shard, kind).element_size()
        for start in range(shard.start, shard.stop, numel):
            piece = shard.narrow(start, start + numel)
            target = self.tensor(piece, kind)
            # Page-locked memory, which torch reuses only after the copy: the next piece is read meanwhile.
            staged = torch.empty(target.shape, dtype=target.dtype, pin_memory=target.device.type == "cuda")
            checkpoint.read([(self.interval(piece, kind), bytes_of(staged))])
            target.copy_(staged, non_blocking=True)

    @torch.no_grad()
    def load_weights(self, source: WeightSource) -> None:
        """Load initial weights into this rank's shards, then refresh the model's weights; collective.

        Each rank reads its own ranges, trained weights straight into the fp32 masters.
        Raises: CheckpointError if they cannot be read.
        """
        self._fill(self.shards, source)
        self.refresh_weights()

    @torch.no_grad()
    def load_base(self, source: WeightSource) -> None:
        """Load parameters that are not trained from the base weights; call `resume` or `load_weights` afterwards.

        Raises: CheckpointError if they cannot be read.
        """
        self._fill(self.base_shards, source)

    def _fill(self, shards: Iterable[Shard], source: WeightSource) -> None:
        try:
            for shard in shards:
                if shard.start < shard.stop and shard.name in source:
                    value = self.tensor(shard, shard.constant or "master")
                    source.read_into(shard.name, value, start=shard.start)
                    if shard.constant is None and self._averages:
                        self.tensor(shard, "ema").copy_(value)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"pretrained weights cannot be read: {error}") from error

    @torch.no_grad()
    def update_average(self, *, decay: float, step: int) -> None:
        """`ema ← d · ema + (1 - d) · master` on this rank's shards, with `d = min(decay, (1 + t) / (10 + t))`.

        The smaller decay of the first steps t reduces the influence of the initial weights.

        Source: `num_updates` of TensorFlow's ExponentialMovingAverage.
        """
        decay = min(decay, (1 + step) / (10 + step))
        averages = [self._averages[id(owner)] for owner in self._owners]
        torch._foreach_lerp_(averages, [owner.detach() for owner in self._owners], 1 - decay)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange weights and average; call again to swap back."""
        for owner in self._owners:
            average = self._averages[id(owner)]
            weights = owner.detach().clone()
            owner.detach().copy_(average)
            average.copy_(weights)
        self.refresh_weights()

    @torch.no_grad()
    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter and buffer of the model, whole, one at a time; collective under ZeRO 3."""
        model = self._engine.module.model
        is_sharded = self._engine.zero_optimization_stage() == 3
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
                yield name, parameter.data
        yield from model.named_buffers()

    def resume(self, *, step: int) -> None:
        """Continue from the loaded state: set the optimizer's step count and refresh the weights; collective."""
        set_step(self._torch_optimizer, step=step)
        self.refresh_weights()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Recompute the model's weights from the master weights; collective."""
        optimizer = self._engine.optimizer
        stage = self._engine.zero_optimization_stage()
        if stage == 3:
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # Small parameters are whole on every rank; gather them again from the shards.
            persistent = [p for p in self._engine.module.parameters() if getattr(p, "ds_persist", False)]
            if persistent:
                for parameter in persistent:
                    parameter.partition()
                persistent[0].all_gather(persistent)
            # Those of hpZ, which `partition` makes from the former values.
            drop_second_copies(self._engine.module.parameters())
        elif stage > 0:
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                torch._foreach_copy_([p.data for p in low], [p.detach() for p in high])


def shards_of(engine: Any) -> list[Shard]:
    """Return this rank's shards of trained parameters, in the order of `named_parameters`.

    Raises: RuntimeError if this release of DeepSpeed has another layout.
    """
    named = [(name, p) for name, p in named_parameters(engine.module) if p.requires_grad]
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


def _constants(engine: Any, *, frozen: str) -> Iterator[Shard]:
    """Yield this rank's shards of tensors that are not trained.

    Args:
        frozen: the kind of parameters: `frozen` or `base`.
    """
    divided, rank = engine.zero_optimization_stage() == 3, dist.get_rank(engine.data_parallel_group)
    named: list[tuple[str, Any]] = list(named_parameters(engine.module))
    for name, parameter in named:
        # What is quantised has its values already.
        if parameter.requires_grad or getattr(parameter, "quant_state", None) is not None:
            continue
        if divided:
            start = rank * parameter.partition_numel()
            stop = min(start + parameter.partition_numel(), parameter.ds_numel)
            owner = parameter.ds_tensor
        else:
            start, stop, owner = 0, parameter.numel(), parameter.data
        if start < stop:
            yield Shard(name=name, start=start, stop=stop, owner=owner, offset=0, constant=frozen)
    for name, buffer in named_buffers(engine.module):
        yield Shard(name=name, start=0, stop=buffer.numel(), owner=buffer, offset=0, constant="buffer")


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a writable view of a host tensor's bytes; bytes, as numpy has no bf16."""
    return memoryview(tensor.detach().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


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
        if mapping is None:  # entirely on other ranks
            continue
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        yield Shard(name=name, start=start, stop=start + size, owner=flat, offset=mapping.hp_fragment_address.start)


def _partitioned(engine: Any, named: list[tuple[str, Any]]) -> Iterator[Shard]:
    optimizer, rank = engine.optimizer, dist.get_rank(engine.data_parallel_group)
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
