"""The door to DeepSpeed: a model, a loss and an optimizer become an engine that takes steps.

The loss of a step is the sum over its real tokens divided by their number over all ranks. Each rank
scales its part by `world_size / tokens_of_the_step` before DeepSpeed averages over the ranks, so
ranks with fewer sequences, or with none in a micro-step, change nothing.

Nothing is compiled at run time: the optimizer is torch's own AdamW, and on CPU the shared-memory
collective that DeepSpeed would build in the background (70 s) is declared unavailable.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from torch import nn
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from forge.config.model import ModelSpec
from forge.config.training import OptimizerSpec, TrainingSpec
from forge.data.loader import MicroBatch
from forge.model.build import build_config, build_model
from forge.model.dropout import SampleDropout, has_dropout
from forge.objective.cross_entropy import CausalLm
from forge.train.metrics import peak_memory_gib
from forge.train.state import TrainState

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
# On CPU torch's fused attention is slower than three plain products up to this many tokens: 1.18 times at
# 128, 1.08 at 256, 1.07 at 512, 0.70 at 1024 (a training step of a small Llama in bf16, one core).
_PLAIN_ATTENTION_TOKENS = 512
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepControl:
    """What rank 0 wishes for this step; after the step every rank holds rank 0's."""

    stop: bool = False
    leave: bool = False
    """End this generation: another is to take its place."""
    save: bool = False
    snapshot: bool = False
    evaluate: bool = False
    trouble: bool = False
    """Some rank could not write its part of a checkpoint: any rank's wish, not only the first's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step as all ranks see it."""

    loss: float
    grad_norm: float
    """Before clipping."""
    peak_memory_gib: float
    """Of the rank with the most."""
    snapshot_cost_s: float
    """Of the rank whose snapshots cost most."""
    flags: StepControl


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a generation meet: a store at the first rank's machine."""

    host: str
    port: int
    listen_fd: int | None = None
    """On the first rank: the socket that listens there already, so that nobody else can have taken the port."""


def join_process_group(*, device: torch.device, rendezvous: Rendezvous | None = None) -> None:
    """Enter the group of `WORLD_SIZE` ranks as number `RANK`; collective.

    Args:
        rendezvous: where they meet; otherwise `MASTER_ADDR` and `MASTER_PORT` say it.
    """
    import_late_modules(device=device.type)
    if rendezvous is not None:
        _meet(rendezvous, device=device)  # DeepSpeed takes the group that is there
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=COLLECTIVE_TIMEOUT,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def import_late_modules(*, device: str) -> None:
    """Import what DeepSpeed would import when an engine is built, and choose its accelerator."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed compiles this operator on first use where it can; it serves inference only.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    _import_muon_uncompiled()


def _meet(rendezvous: Rendezvous, *, device: torch.device) -> None:
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
    """A DeepSpeed engine that speaks forge's terms: steps, exact losses, shards of state."""

    def __init__(
        self,
        engine: Any,
        *,
        training: TrainingSpec,
        has_linear_head: bool = False,
        dropout: SampleDropout | None = None,
    ) -> None:
        """Args:
        engine: what `deepspeed.initialize` gave, around a `CausalLm`.
        has_linear_head: what the model answered, or was known to; the loss is taken in chunks then.
        dropout: is told of every micro-batch, where the model has any.
        """
        self.has_linear_head = has_linear_head
        self._engine = engine
        self._dropout = dropout
        self._training = training
        self.state = TrainState(engine, keep_average=training.ema is not None)
        self.device: torch.device = engine.device
        self.before_update: Callable[[], None] = lambda: None
        """Called before the training state changes."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called before and after everything that may wait for other ranks."""

    def step(
        self,
        step: int,
        micro_batches: Iterable[MicroBatch],
        *,
        num_tokens: int,
        lr: float,
        wishes: Callable[[], StepControl],
        snapshot_cost_s: Callable[[], float] = lambda: 0.0,
    ) -> StepResult:
        """Forward, backward and update over one global batch; collective.

        Args:
            step: its number, from 1.
            num_tokens: predicted tokens of the step over all ranks.
            lr: the learning rate of this step.
            wishes: rank 0's, asked at the step's end; on the others ignored, but for trouble.
            snapshot_cost_s: what snapshots have cost this rank.
        """
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            if self._dropout is not None:
                self._dropout.begin(step=step, positions=batch.positions)
            self.on_progress()
            loss = self._loss(batch)
            loss_sum += loss.detach().double()
            engine.backward(loss * (engine.dp_world_size / num_tokens), scale_wrt_gas=False)
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
        shared = self._agree(loss_sum, own=(peak_memory_gib(self.device), snapshot_cost_s()), wishes=wishes())
        self.on_progress()
        return StepResult(
            loss=shared.loss_sum / num_tokens,
            grad_norm=grad_norm,
            peak_memory_gib=max(shared.memory_gib),
            snapshot_cost_s=max(shared.snapshot_cost_s),
            flags=shared.flags,
        )

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """Summed loss and number of predicted tokens over all ranks' batches; collective."""
        self._engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in micro_batches:
                self.on_progress()
                sums[0] += self._loss(batch).double()
                sums[1] += int((batch.targets >= 0).sum())
        dist.all_reduce(sums)
        self._engine.train()
        return sums[0].item(), int(sums[1].item())

    def _loss(self, batch: MicroBatch) -> torch.Tensor:
        tokens = torch.from_numpy(batch.tokens).to(self.device, non_blocking=True)
        targets = torch.from_numpy(batch.targets).to(self.device, non_blocking=True)
        loss: torch.Tensor = self._engine(tokens, targets)
        return loss

    def _clip_by_hand(self) -> float | None:
        """fp32 under ZeRO 0 is plain torch to DeepSpeed, which clips there without telling the norm."""
        if self._engine.zero_optimization_stage() > 0 or self._training.precision != "fp32":
            return None
        limit = self._training.optimizer.grad_clip or float("inf")
        return float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))

    def _agree(self, loss_sum: torch.Tensor, *, own: tuple[float, float], wishes: StepControl) -> _Shared:
        """One all-reduce for the loss, the wishes of rank 0 and every rank's figures, each in its own place."""
        rank, world_size = self._engine.global_rank, self._engine.dp_world_size
        names = [field.name for field in fields(StepControl)]
        wished = [float(getattr(wishes, name) and (rank == 0 or name == "trouble")) for name in names]
        memory, cost = [0.0] * world_size, [0.0] * world_size
        memory[rank], cost[rank] = own
        shared = torch.tensor([0.0, *wished, *memory, *cost], dtype=torch.float64, device=self.device)
        shared[0] = loss_sum
        dist.all_reduce(shared)
        total, *rest = shared.tolist()
        flags, figures = rest[: len(names)], rest[len(names) :]
        return _Shared(
            loss_sum=total,
            memory_gib=figures[:world_size],
            snapshot_cost_s=figures[world_size:],
            flags=StepControl(**{name: value > 0 for name, value in zip(names, flags, strict=True)}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What all ranks know after a step."""

    loss_sum: float
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
    skip_init: bool = False,
    has_linear_head: bool | None = None,
) -> Engine:
    """Build the network, its loss and its optimizer, and hand them to DeepSpeed; collective.

    Under ZeRO 3 every module is divided as soon as it is built, so no rank ever holds the whole model.

    Args:
        skip_init: give the weights no values, as all of them are going to be read.
        has_linear_head: what the model answered before; otherwise it is asked, which a blank one cannot be.
    """
    config = build_config(model_spec, vocab_size=vocab_size, seq_len=seq_len, eot_id=eot_id)
    drops = has_dropout(config)
    is_short = device.type == "cpu" and seq_len <= _PLAIN_ATTENTION_TOKENS
    if drops or (is_short and "attn_implementation" not in model_spec.config_overrides):
        # Fused attention also draws its dropout from a stream of its own that nobody can place.
        config._attn_implementation = "eager"
    divided = training.zero.stage == 3
    model = build_model(
        model_spec,
        config,
        seed=training.seed,
        dtype=DTYPES[training.precision],
        construct=_divide_when_built(deepspeed_config) if divided else None,
        gather=_gather if divided else None,
        skip_init=skip_init,
    )
    if training.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = CausalLm(model)
    optimizer = build_optimizer(objective, training.optimizer, device=device)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=deepspeed_config)
    if has_linear_head is None:
        has_linear_head = training.cross_entropy == "chunked" and _has_linear_head(engine, vocab_size=vocab_size)
    if has_linear_head:
        objective.use_chunks()
    dropout = SampleDropout(model, seed=training.seed) if drops else None
    if dropout is not None:
        dropout.install()
    return Engine(engine, training=training, has_linear_head=has_linear_head, dropout=dropout)


def build_optimizer(module: nn.Module, spec: OptimizerSpec, *, device: torch.device) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, fused where torch can; its rate is 0 until a step sets it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Under ZeRO 3 a divided parameter is empty; its shape is kept beside it.
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        fused=device.type in ("cuda", "cpu"),
    )


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


def _has_linear_head(engine: Any, *, vocab_size: int) -> bool:
    """Ask the model on a few tokens; collective."""
    engine.eval()
    tokens = torch.arange(8, device=engine.device).unsqueeze(0) % vocab_size
    with torch.no_grad():
        answer = engine(tokens)
    engine.train()
    return bool(answer.item())


@contextmanager
def _divide_when_built(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Modules built meanwhile are divided at once; rotary frequencies are still computed in fp32."""
    with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config):
        yield


def _gather(parameters: list[nn.Parameter]) -> Any:
    """Whole parameters while it lasts; what rank 0 wrote is sent to all."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
