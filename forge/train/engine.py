"""A model, a loss and an optimizer as a DeepSpeed engine that takes steps.

The loss of a step is the sum over all ranks divided by the total weight of the step's rows, which every rank
computes from the store. Each rank scales its part by `world_size / total_weight` before DeepSpeed averages over
the ranks, so ranks with fewer rows, or with none in a micro-step, change nothing.

Nothing of DeepSpeed's is compiled at run time: no optimizer is one of its own, and on CPU the shared-memory
collective that DeepSpeed would build in the background (70 s) is declared unavailable.

The module is long (over 400 lines) because a step, its sums and the build of what makes it are one subject.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol, runtime_checkable

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from forge.checkpoint.manifest import BaseWeights
from forge.config.model import ModelSpec
from forge.config.training import TrainingSpec
from forge.data.loader import MicroBatch
from forge.errors import RunError
from forge.model.dropout import SampleDropout, model_has_dropout
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.registry import family_of
from forge.model.pretrained import some
from forge.model.selective_checkpoint import enable_checkpointing
from forge.objective.base import (
    Objective,
    ObjectiveModule,
    TwoPassObjective,
    batch_weight,
    count_sizes,
    derived_metrics,
)
from forge.train.base_weights import digest_base, initial_weights
from forge.train.cuda import move_to
from forge.train.first_pass import Prepared, with_first_pass
from forge.train.fp8 import use_fp8
from forge.train.local_time import LocalTime
from forge.train.metric_sums import MetricSums
from forge.train.metrics import peak_memory_gib
from forge.train.optimizer import build_optimizer
from forge.train.row_seeds import row_seeds
from forge.train.sequence_parallel import SequenceParallel
from forge.train.shard_groups import ShardGroups
from forge.train.state import TrainState
from forge.train.zero3 import gather_whole_modules, sharding_of


@runtime_checkable
class _Chunked(Protocol):
    """An objective that can do without the logits of the whole micro-batch."""

    def use_chunks(self, model: nn.Module) -> None:
        """Compute logits in chunks from here on."""


_Inputs = Mapping[str, torch.Tensor]
"""What an objective makes of a micro-batch."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepControl:
    """What to do at the end of a step. Every rank proposes; rank 0's flags are sent to all in the all-reduce."""

    stop: bool = False
    drain: bool = False
    """End this generation after a snapshot, from which the next one continues."""
    save: bool = False
    snapshot: bool = False
    evaluate: bool = False
    save_failed: bool = False
    """A rank could not write its part of a checkpoint; true if it is on any rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The outcome of one optimizer step, the same on every rank."""

    loss: float
    grad_norm: float
    """Before clipping."""
    metrics: Mapping[str, float]
    """Means over the step of what the objective reported with its loss."""
    peak_memory_gib: float
    """Maximum over all ranks."""
    snapshot_cost_s: float
    """Maximum over all ranks."""
    flags: StepControl


class Engine:
    """A DeepSpeed engine with forge's interface: steps, exact losses, shards of the state."""

    def __init__(
        self,
        engine: Any,
        *,
        training: TrainingSpec,
        dropout: SampleDropout | None = None,
        base: BaseWeights | None = None,
        sequence: SequenceParallel | None = None,
        groups: ShardGroups | None = None,
    ) -> None:
        """Args:
        engine: what `deepspeed.initialize` returned, around an `ObjectiveModule`.
        dropout: gets the positions of every micro-batch, where the model has any dropout.
        base: the pretrained weights that frozen parameters refer to.
        sequence: splits each sequence over ranks, if they share any.
        groups: the groups that each hold the whole state, if there are several.
        """
        self._engine = engine
        self._module: ObjectiveModule = engine.module
        self.metric_directions = self._module.objective.metric_directions
        self._dropout = dropout
        self._sequence = sequence
        self._groups = groups
        self._training = training
        num_groups = 1 if groups is None else groups.num_groups
        self.state = TrainState(engine, keep_average=training.ema is not None, base=base, num_groups=num_groups)
        self.device: torch.device = engine.device
        self.before_update: Callable[[], None] = lambda: None
        """Called before the training state changes."""
        self.before_reduce: Callable[[], None] = lambda: None
        """Called before the all-reduce that ends a step; no rank leaves that before all ranks have called this."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called before and after each operation that may wait for other ranks."""
        is_partitioned = engine.zero_optimization_stage() == 3
        self.own_time = LocalTime(self._module, device=self.device, gathers_weights=is_partitioned)
        if sequence is not None:
            sequence.waiting = self.own_time.waiting

    @property
    def model(self) -> nn.Module:
        return self._module.model

    @property
    def has_dropout(self) -> bool:
        return self._dropout is not None

    def step(
        self,
        step: int,
        micro_batches: Iterable[MicroBatch],
        *,
        total_weight: float,
        lr: float,
        requests: Callable[[], StepControl],
        snapshot_cost_s: Callable[[], float] = lambda: 0.0,
    ) -> StepResult:
        """Forward, backward and update over one global batch; collective.

        Args:
            step: number of the step, from 1.
            total_weight: number of loss terms of the step over all ranks; the loss is divided by it.
            lr: learning rate of this step.
            requests: called at the end of the step; ignored on ranks other than 0, except `save_failed`.
            snapshot_cost_s: seconds that snapshots have cost this rank so far.

        Raises: ValueError if `total_weight` is not above 0.
        """
        engine, objective = self._engine, self._module.objective
        batches, total_weight = self._prepared(step, micro_batches, total_weight=total_weight)
        if not total_weight > 0:
            raise ValueError(f"step {step} has a total weight of {total_weight}: it has no loss to minimise")
        for group in engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        engine.train()
        sums = self._sums()
        for batch, inputs in with_first_pass(objective, batches, run=partial(self._first_pass, step=step)):
            self._begin_dropout(step, batch, inputs)
            self.on_progress()
            with self.own_time.forward():
                loss = self._forward(inputs)
            sums.add(self._module.result)
            engine.backward(loss * (engine.dp_world_size / total_weight), scale_wrt_gas=False)
            self.on_progress()
            own_norm = None
            if engine.is_gradient_accumulation_boundary():
                self.before_update()
                if self._groups is not None:
                    self._groups.sum_gradients(engine)
                own_norm = self._clip_by_hand()
            engine.step()
            self.on_progress()
        if self._training.ema is not None:
            self.state.update_average(decay=self._training.ema.decay, step=step)
        norm = engine.get_global_grad_norm() if own_norm is None else own_norm
        grad_norm = float("nan" if norm is None else norm)
        self.before_reduce()
        figures = (peak_memory_gib(self.device), snapshot_cost_s(), *([grad_norm] if self._groups else []))
        shared = self._all_reduce(sums, figures=figures, requests=requests())
        self.own_time.end_step()
        self.on_progress()
        self._check_weight(shared.weight, total_weight=total_weight, step=step)
        if self._groups is not None:
            self._groups.compare_norms(shared.grad_norms, step=step)
        mean, means = shared.loss_sum / total_weight, shared.means
        if math.isfinite(mean):
            means = derived_metrics(self._module.objective, means | {"loss": mean}, counts=shared.counts)
        return StepResult(
            loss=mean,
            metrics={name: value for name, value in means.items() if name != "loss"},
            grad_norm=grad_norm,
            peak_memory_gib=max(shared.memory_gib),
            snapshot_cost_s=max(shared.snapshot_cost_s),
            flags=shared.flags,
        )

    def evaluate(self, micro_batches: Iterable[MicroBatch], *, parts: Sequence[str] = ()) -> dict[str, float]:
        """Mean loss, under `loss`, those of the parts of a mixture, under `loss/<part>`, and mean metrics over all
        ranks' batches, empty if no row has a loss; collective.
        """
        self._engine.eval()
        sums = self._sums(parts)
        objective = self._module.objective
        with torch.no_grad():
            results, taken = [], []
            for batch in micro_batches:
                self.on_progress()
                if isinstance(objective, TwoPassObjective):
                    results.append(self._first_pass((batch, self._inputs(0, batch)), step=0))
                    taken.append((batch.positions, batch.part))
                else:
                    self._forward(self._inputs(0, batch), with_metrics=True)
                    sums.add(self._module.result)
                    sums.add({f"loss/{batch.part}": self._module.result["loss"]})
            if isinstance(objective, TwoPassObjective) and results:
                of_parts = {"parts": [part for _, part in taken]} if parts else {}
                sums.add(objective.held_out(results, positions=[at for at, _ in taken], **of_parts))
        dist.all_reduce(sums.values)
        self._engine.train()
        return derived_metrics(self._module.objective, sums.means(), counts=sums.counts())

    def _sums(self, parts: Sequence[str] = ()) -> MetricSums:
        sizes, names = count_sizes(self._module.objective), [f"loss/{part}" for part in parts]
        return MetricSums([*sorted(self.metric_directions), *names], device=self.device, count_sizes=sizes)

    def _prepared(
        self, step: int, micro_batches: Iterable[MicroBatch], *, total_weight: float
    ) -> tuple[Iterable[tuple[MicroBatch, _Inputs]], float]:
        """Convert micro-batches for the model: one after the other, or all first if their weights must be added up.

        Returns: them, and the total weight of the step.
        """
        converted = self.own_time.fetching((batch, self._inputs(step, batch)) for batch in micro_batches)
        if not hasattr(self._module.objective, "weight"):
            return converted, total_weight
        batches = list(converted)
        own = sum(batch_weight(self._module.objective, inputs) or 0.0 for _, inputs in batches)
        total = torch.tensor(own, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return batches, total.item()

    def _first_pass(self, prepared: Prepared, *, step: int) -> Mapping[str, torch.Tensor]:
        batch, inputs = prepared
        self._begin_dropout(step, batch, inputs)
        self.on_progress()
        self._forward(inputs, is_first_pass=True)
        return self._module.first_result

    def _begin_dropout(self, step: int, batch: MicroBatch, inputs: _Inputs) -> None:
        if self._dropout is not None:
            rows = inputs["sequence_rows"].numpy() if "sequence_rows" in inputs else None
            self._dropout.begin(step=step, positions=batch.positions, sequence_rows=rows)

    def _inputs(self, step: int, batch: MicroBatch) -> _Inputs:
        """Convert a micro-batch; step 0 is an evaluation."""
        seeds = row_seeds(self._training.seed, step=step, positions=batch.positions)
        return self._module.objective.batch({**batch.arrays, "row_seeds": seeds})

    def _forward(self, inputs: _Inputs, *, with_metrics: bool = False, is_first_pass: bool = False) -> torch.Tensor:
        moved = move_to(self.device, inputs if self._sequence is None else self._sequence.split(inputs))
        loss: torch.Tensor = self._engine(moved, with_metrics=with_metrics, is_first_pass=is_first_pass)
        return loss

    def _check_weight(self, weight: float, *, total_weight: float, step: int) -> None:
        """Raises: RunError if the objective's weights do not sum to those of the store."""
        if not abs(weight - total_weight) <= 1e-6 * total_weight:  # nan too
            name = type(self._module.objective).__name__
            raise RunError(
                f"step {step}: {name} counts a weight of {weight:g}, but the step has {total_weight:g}; "
                "the weights that a loss returns must sum to those that the format gave its examples"
            )

    def _clip_by_hand(self) -> float | None:
        """Clip for fp32 under ZeRO 0, where DeepSpeed does not return the norm. Returns: the norm, else None."""
        if self._engine.zero_optimization_stage() > 0 or self._training.precision != "fp32":
            return None
        limit = self._training.optimizer.grad_clip or float("inf")
        return float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))

    def _all_reduce(self, sums: MetricSums, *, figures: tuple[float, ...], requests: StepControl) -> _Shared:
        """Reduce the sums, rank 0's flags, and one value per rank for each figure in one all-reduce."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        names = [field.name for field in fields(StepControl)]
        flags = [float(getattr(requests, name) and (rank == 0 or name == "save_failed")) for name in names]
        own = torch.zeros(len(flags) + len(figures) * world_size, dtype=torch.float64)
        own[: len(flags)] = torch.tensor(flags)
        own[len(flags) + rank :: world_size] = torch.tensor(figures, dtype=torch.float64)
        shared = torch.cat([sums.values, own.to(self.device)])
        dist.all_reduce(shared)
        # The only wait of a step for a GPU.
        sums.values, rest = torch.split(shared.cpu(), [len(sums.values), len(own)])
        flags, per_rank = rest[: len(names)].tolist(), rest[len(names) :].view(len(figures), world_size).tolist()
        return _Shared(
            loss_sum=sums.values[0].item(),
            weight=sums.values[1].item(),
            means=sums.means(),
            counts=sums.counts(),
            memory_gib=per_rank[0],
            snapshot_cost_s=per_rank[1],
            grad_norms=per_rank[2] if len(per_rank) > 2 else [],
            flags=StepControl(**{name: value > 0 for name, value in zip(names, flags, strict=True)}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """The sums of the all-reduce that ends a step."""

    loss_sum: float
    weight: float
    means: dict[str, float]
    counts: dict[str, torch.Tensor]
    memory_gib: list[float]
    snapshot_cost_s: list[float]
    grad_norms: list[float]
    """Of every rank, with shard groups."""
    flags: StepControl


def build_engine(
    model_spec: ModelSpec,
    training: TrainingSpec,
    *,
    deepspeed_config: dict[str, Any],
    data: DataShape,
    objective: Objective,
    device: torch.device,
    has_linear_head: bool,
    skip_init: bool = False,
    pins_base: bool = False,
    sequence_parallel_size: int = 1,
    num_shard_groups: int = 1,
    attention: str | None = None,
) -> Engine:
    """Build the model, its loss and its optimizer, and pass them to DeepSpeed; collective.

    Under ZeRO 3 every module is partitioned as soon as it is built, so no rank ever holds the whole model.

    Args:
        has_linear_head: `ModelInfo.has_linear_head` of the plan: whether the loss may be computed in chunks.
        skip_init: do not initialise the weights, as all of them will be loaded.
        pins_base: checkpoints name the pretrained weights even if they do not refer to any, since the objective
            compares with them.
        sequence_parallel_size: ranks that share each sequence.
        num_shard_groups: groups of ranks that each hold the whole state.
        attention: transformers' `attn_implementation`; None: by device and length.
    """
    family = family_of(model_spec)
    groups = ShardGroups.join(num_shard_groups)
    deepspeed.utils.groups.mpu = None  # of an engine that was built before in this process
    model = family.build(
        model_spec,
        data,
        options=BuildOptions(
            dtype=DTYPES[training.precision],
            device=device,
            seed=training.seed,
            skip_init=skip_init,
            sharding=sharding_of(deepspeed_config, shard_groups=groups) if training.zero.stage == 3 else None,
            attention=attention,
        ),
    )
    _checkpoint_activations(model, training, device=device)
    if training.fp8:
        use_fp8(model, device=device, stage=training.zero.stage, recomputes=bool(training.activation_checkpointing))
    sequence = SequenceParallel.of(model, sequence_parallel_size)
    if training.zero.stage == 3:
        gather_whole_modules(model)
    module = ObjectiveModule(model, objective=objective)
    optimizer = build_optimizer(module, training.optimizer, device=device)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, mpu=groups, config=deepspeed_config)
    if isinstance(objective, _Chunked) and training.cross_entropy == "chunked" and has_linear_head:
        objective.use_chunks(model)
    part = None if sequence is None else (sequence.part, sequence_parallel_size)
    dropout = SampleDropout(model, seed=training.seed, part=part) if model_has_dropout(model) else None
    if dropout is not None:
        dropout.install()
    if model_spec.from_pretrained is None:
        return Engine(engine, training=training, dropout=dropout, sequence=sequence, groups=groups)
    weights = family.open_pretrained(model_spec, data)
    if weights.unused and dist.get_rank() == 0:
        unused = f"tensors that the model does not have are not used: {some(weights.unused)}"
        sys.stderr.write(f"{model_spec.from_pretrained}: {unused}\n")
    pins_base = pins_base or any(not parameter.requires_grad for parameter in model.parameters())
    base = digest_base(weights.files) if pins_base else None
    built = Engine(engine, training=training, dropout=dropout, base=base, sequence=sequence, groups=groups)
    built.state.load_base(weights)
    if not skip_init:
        source = model_spec.adapters_from
        first = initial_weights(weights, model, built.state.shape, seed=training.seed, adapters_from=source)
        built.state.load_weights(first)
    return built


def _checkpoint_activations(model: nn.Module, training: TrainingSpec, *, device: torch.device) -> None:
    """Have the model compute activations again in the backward pass, if the job says so."""
    if training.activation_checkpointing:
        is_selective = training.activation_checkpointing == "selective"
        offloads = training.activation_offload and device.type == "cuda"
        enable_checkpointing(model, is_selective=is_selective, offloads=offloads)
