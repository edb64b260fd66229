"""A model, a loss and an optimizer as a DeepSpeed engine that takes steps.

The loss of a step is the sum over all ranks divided by the total weight of the step's rows, which every rank
computes from the store. Each rank scales its part by `world_size / total_weight` before DeepSpeed averages over
the ranks, so ranks with fewer rows, or with none in a micro-step, change nothing.

Nothing is compiled at run time: the optimizer is torch's own AdamW, and on CPU the shared-memory
collective that DeepSpeed would build in the background (70 s) is declared unavailable.
"""

from __future__ import annotations

import datetime
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from torch import nn
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from forge.checkpoint.manifest import BaseWeights
from forge.config.model import ModelSpec
from forge.config.training import TrainingSpec
from forge.data.loader import MicroBatch
from forge.errors import ModelError, RunError
from forge.model.adapters import modules_reading_weights
from forge.model.dropout import SampleDropout, model_has_dropout
from forge.model.families.base import BuildOptions, DataShape, Sharding
from forge.model.families.registry import family_of
from forge.objective.base import ObjectiveModule, derived_metrics
from forge.objective.build import build_objective
from forge.objective.causal_lm import CausalLm
from forge.train.base_weights import digest_base, initial_weights
from forge.train.metric_sums import MetricSums
from forge.train.metrics import peak_memory_gib
from forge.train.optimizer import build_optimizer
from forge.train.state import TrainState

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Address of a generation's TCP store, on rank 0's machine."""

    host: str
    port: int
    listen_fd: int | None = None
    """On rank 0: a socket that already listens on the port, so that no other process can take it."""


def join_process_group(*, device: torch.device, rendezvous: Rendezvous | None = None) -> None:
    """Join the process group of `WORLD_SIZE` ranks as rank `RANK`; collective.

    Args:
        rendezvous: address of the store; by default `MASTER_ADDR` and `MASTER_PORT`.
    """
    import_late_modules(device=device.type)
    if rendezvous is not None:
        _init_with_store(rendezvous, device=device)  # DeepSpeed uses the existing group
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=COLLECTIVE_TIMEOUT,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def import_late_modules(*, device: str) -> None:
    """Import modules that DeepSpeed would import when an engine is built, and choose its accelerator."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed compiles this operator on first use where it can; it serves inference only.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    _import_muon_uncompiled()


def _init_with_store(rendezvous: Rendezvous, *, device: torch.device) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        world_size,
        rank == 0,
        COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=rendezvous.listen_fd,
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


class Engine:
    """A DeepSpeed engine with forge's interface: steps, exact losses, shards of the state."""

    def __init__(
        self,
        engine: Any,
        *,
        training: TrainingSpec,
        dropout: SampleDropout | None = None,
        base: BaseWeights | None = None,
    ) -> None:
        """Args:
        engine: what `deepspeed.initialize` returned, around an `ObjectiveModule`.
        dropout: gets the positions of every micro-batch, where the model has any dropout.
        base: the pretrained weights that frozen parameters refer to.
        """
        self._engine = engine
        self._module: ObjectiveModule = engine.module
        self.metric_directions = self._module.objective.metric_directions
        self._dropout = dropout
        self._training = training
        self.state = TrainState(engine, keep_average=training.ema is not None, base=base)
        self.device: torch.device = engine.device
        self.before_update: Callable[[], None] = lambda: None
        """Called before the training state changes."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called before and after each operation that may wait for other ranks."""

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
        if not total_weight > 0:
            raise ValueError(f"step {step} has a total weight of {total_weight}: it has no loss to minimise")
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        engine.train()
        sums = MetricSums(sorted(self.metric_directions), device=self.device)
        for batch in micro_batches:
            if self._dropout is not None:
                self._dropout.begin(step=step, positions=batch.positions)
            self.on_progress()
            loss = self._forward(batch)
            sums.add(self._module.result)
            engine.backward(loss * (engine.dp_world_size / total_weight), scale_wrt_gas=False)
            self.on_progress()
            own_norm = None
            if engine.is_gradient_accumulation_boundary():
                self.before_update()
                own_norm = self._clip_by_hand()
            engine.step()
            self.on_progress()
        if self._training.ema is not None:
            self.state.update_average(decay=self._training.ema.decay, step=step)
        norm = engine.get_global_grad_norm() if own_norm is None else own_norm
        grad_norm = float("nan" if norm is None else norm)
        figures = (peak_memory_gib(self.device), snapshot_cost_s())
        shared = self._all_reduce(sums, figures=figures, requests=requests())
        self.on_progress()
        self._check_weight(shared.weight, total_weight=total_weight, step=step)
        mean, means = shared.loss_sum / total_weight, shared.means
        if math.isfinite(mean):
            means = derived_metrics(self._module.objective, means | {"loss": mean})
        return StepResult(
            loss=mean,
            metrics={name: value for name, value in means.items() if name != "loss"},
            grad_norm=grad_norm,
            peak_memory_gib=max(shared.memory_gib),
            snapshot_cost_s=max(shared.snapshot_cost_s),
            flags=shared.flags,
        )

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Mean loss, under `loss`, and mean metrics over all ranks' batches; collective.

        Returns: an empty mapping if no row has a loss.
        """
        self._engine.eval()
        sums = MetricSums(sorted(self.metric_directions), device=self.device)
        with torch.no_grad():
            for batch in micro_batches:
                self.on_progress()
                self._forward(batch, with_metrics=True)
                sums.add(self._module.result)
        dist.all_reduce(sums.values)
        self._engine.train()
        return derived_metrics(self._module.objective, sums.means())

    def _forward(self, batch: MicroBatch, *, with_metrics: bool = False) -> torch.Tensor:
        inputs = {
            name: values.to(self.device, non_blocking=True)
            for name, values in self._module.objective.batch(batch.arrays).items()
        }
        loss: torch.Tensor = self._engine(inputs, with_metrics=with_metrics)
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

    def _all_reduce(self, sums: MetricSums, *, figures: tuple[float, float], requests: StepControl) -> _Shared:
        """Reduce the sums, rank 0's flags, and one value per rank for each figure in one all-reduce."""
        rank, world_size = self._engine.global_rank, self._engine.dp_world_size
        names = [field.name for field in fields(StepControl)]
        flags = [float(getattr(requests, name) and (rank == 0 or name == "save_failed")) for name in names]
        memory, cost = [0.0] * world_size, [0.0] * world_size
        memory[rank], cost[rank] = figures
        own = torch.tensor([*flags, *memory, *cost], dtype=torch.float64, device=self.device)
        shared = torch.cat([sums.values, own])
        dist.all_reduce(shared)
        sums.values = shared[: len(sums.values)]
        rest = shared[len(sums.values) :].tolist()
        flags, per_rank = rest[: len(names)], rest[len(names) :]
        return _Shared(
            loss_sum=sums.values[0].item(),
            weight=sums.values[1].item(),
            means=sums.means(),
            memory_gib=per_rank[:world_size],
            snapshot_cost_s=per_rank[world_size:],
            flags=StepControl(**{name: value > 0 for name, value in zip(names, flags, strict=True)}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """The sums of the all-reduce that ends a step."""

    loss_sum: float
    weight: float
    means: dict[str, float]
    memory_gib: list[float]
    snapshot_cost_s: list[float]
    flags: StepControl


def build_engine(
    model_spec: ModelSpec,
    training: TrainingSpec,
    *,
    deepspeed_config: dict[str, Any],
    vocab_size: int,
    seq_len: int,
    eot_id: int,
    device: torch.device,
    has_linear_head: bool,
    skip_init: bool = False,
) -> Engine:
    """Build the model, its loss and its optimizer, and pass them to DeepSpeed; collective.

    Under ZeRO 3 every module is partitioned as soon as it is built, so no rank ever holds the whole model.

    Args:
        has_linear_head: `ModelInfo.has_linear_head` of the plan: whether the loss may be computed in chunks.
        skip_init: do not initialise the weights, as all of them will be loaded.
    """
    family, data = family_of(model_spec), DataShape(vocab_size=vocab_size, seq_len=seq_len, eot_id=eot_id)
    model = family.build(
        model_spec,
        data,
        options=BuildOptions(
            dtype=DTYPES[training.precision],
            device=device,
            seed=training.seed,
            skip_init=skip_init,
            sharding=_sharding(deepspeed_config) if training.zero.stage == 3 else None,
        ),
    )
    if training.activation_checkpointing:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ModelError("has no gradient_checkpointing_enable() for activation_checkpointing", key="class")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for whole in modules_reading_weights(model):
        deepspeed.utils.set_z3_leaf_module(whole, True)
    objective = build_objective(training.objective)
    module = ObjectiveModule(model, objective=objective)
    optimizer = build_optimizer(module, training.optimizer, device=device)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config)
    if isinstance(objective, CausalLm) and training.cross_entropy == "chunked" and has_linear_head:
        objective.use_chunks(model)
    dropout = SampleDropout(model, seed=training.seed) if model_has_dropout(model) else None
    if dropout is not None:
        dropout.install()
    if model_spec.from_pretrained is None:
        return Engine(engine, training=training, dropout=dropout)
    weights = family.open_pretrained(model_spec, data)
    if weights.unused and dist.get_rank() == 0:
        names = ", ".join(weights.unused)
        sys.stderr.write(
            f"{model_spec.from_pretrained}: tensors that the model does not have are not used: {names}\n"
        )
    has_frozen = any(not parameter.requires_grad for parameter in model.parameters())
    built = Engine(
        engine, training=training, dropout=dropout, base=digest_base(weights.files) if has_frozen else None
    )
    built.state.load_base(weights)
    if not skip_init:
        built.state.load_weights(initial_weights(weights, model, built.state.shape, seed=training.seed))
    return built


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compiler, which its decorators would load (1.2 s a rank).

    `deepspeed.initialize` imports it to ask whether its optimizer is a Muon; forge's never is.
    """
    compile_ = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_


def _sharding(deepspeed_config: dict[str, Any]) -> Sharding:
    return Sharding(
        construct=partial(_partition_when_built, deepspeed_config),
        gather=_gather,
        partition=lambda module: deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config) and None,
    )


@contextmanager
def _partition_when_built(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Partition modules as they are built; rotary frequencies are still computed in fp32."""
    with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config):
        yield


def _gather(parameters: list[nn.Parameter]) -> Any:
    """Gather whole parameters; changes by rank 0 are broadcast on exit."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
