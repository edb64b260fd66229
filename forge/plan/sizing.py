"""The best model for a limit: what a scaling law says for the FLOPs that money or time buys on given machines.

The speed of training depends on the size of the model, so the limit is turned into FLOPs by bisection: the most
FLOPs whose best model is trained within the limit, at the throughput that `forge.plan.throughput` expects. Only the
training steps count; evaluation, checkpoints, starting and preemptions are in the bill of the job (`forge plan`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

from forge.config.section import Checkpointing
from forge.config.training import TrainingSpec
from forge.errors import PlanError
from forge.plan.batch import BatchPlan, plan_batch
from forge.plan.inputs import ModelInfo
from forge.plan.llama_shape import LlamaShape, llama_shape
from forge.plan.machines import Machines
from forge.plan.memory import MemoryEstimate, estimate_memory, max_micro_batch_size
from forge.plan.parameter_groups import OptimizerState
from forge.plan.rank_groups import NO_GROUPS, RankGroups, possible_hpz, possible_shard_groups
from forge.plan.scaling import BESIROGLU, ModelScale, ScalingLaw, batch_and_rate, bisect_log
from forge.plan.snapshot_memory import num_copies_in_memory
from forge.plan.step_work import step_work
from forge.plan.throughput import Estimate, estimate_step, with_uncertainty
from forge.plan.world_size import LEAST_GAIN

PATIENCE_HOURS = 14 * 24.0
"""Machines are added until a run takes no longer, if their number is not given."""
_LEAST_FLOPS = 1e6
_LEAST_SHARE = 1e-4
"""Of the peak of the GPUs, that a run uses."""
_ENGINES: tuple[tuple[int, Checkpointing], ...] = (
    *((2, False), (3, False), (2, "selective"), (3, "selective")),
    *((2, True), (3, True)),
)
"""ZeRO stage, and `training.activation_checkpointing`; of those that fit, the fastest is taken, with the groups
that `plan_world_size` chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a run may take at most."""

    kind: Literal["usd", "flops", "hours"]
    amount: float

    def __str__(self) -> str:
        texts = {
            "usd": f"{self.amount:,.2f} USD" if self.amount >= 0.01 else f"{self.amount:.2g} USD",
            "flops": f"{self.amount:.3g} FLOPs",
            "hours": f"{self.amount:,.1f} hours" if self.amount >= 0.1 else f"{self.amount:.2g} hours",
        }
        return texts[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is asked for."""

    limit: Limit
    law: ScalingLaw = BESIROGLU
    inference_tokens: float = 0.0
    seq_len: int = 2048
    vocab_size: int = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedRun:
    """A model, its tokens, and how they are trained on some machines."""

    goal: Goal
    machines: Machines
    shape: LlamaShape
    num_tokens: int
    learning_rate: float
    training: TrainingSpec
    batch: BatchPlan
    tokens_per_s: Estimate
    """Of all GPUs together."""
    groups: RankGroups = NO_GROUPS

    @property
    def scale(self) -> ModelScale:
        """Its number of parameters and of tokens."""
        return ModelScale(num_parameters=self.shape.num_parameters, num_tokens=self.num_tokens)

    @property
    def hours(self) -> Estimate:
        """Duration of its steps."""
        return self.tokens_per_s.scaled(3600).inverted(self.num_tokens)

    @property
    def usd(self) -> Estimate | None:
        """Price of these hours; None if the machines' price is unknown."""
        price = self.machines.usd_per_hour
        return None if price is None else self.hours.scaled(price)

    def taken(self, kind: Literal["usd", "flops", "hours"]) -> float:
        """What it is expected to take of a limit; infinite if that is unknown."""
        if kind == "flops":
            return self.scale.training_flops
        return self.hours.likely * (1.0 if kind == "hours" else self.machines.usd_per_hour or math.inf)


def best_run(goal: Goal, machines: Iterable[Machines]) -> SizedRun:
    """Return the run with the least expected loss of all machines; of equal loss, the cheapest.

    Raises: PlanError if none of the machines can train a model within the limit, with what would be possible.
    """
    machines = list(machines)
    runs = [run for one in machines if (run := size_run(goal, one)) is not None]
    if not runs:
        raise PlanError(_problem(goal, machines))

    def order(run: SizedRun) -> tuple[float, float, float]:
        # Runs of equal FLOPs differ in loss by the rounding of the shapes alone.
        loss = 0.0 if goal.limit.kind == "flops" else round(goal.law.loss(run.scale), 3)
        return loss, run.taken("usd"), run.hours.likely

    return min(runs, key=order)


def size_run(goal: Goal, machines: Machines) -> SizedRun | None:
    """Return the best run for a limit on some machines; None if not even the smallest model keeps to it."""
    kind, amount = goal.limit.kind, goal.limit.amount

    def exceeds(flops: float) -> bool:
        run = _run_with(flops, goal=goal, machines=machines)
        return run is None or run.taken(kind) > amount

    flops = amount
    if kind != "flops":
        hours = amount if kind == "hours" else amount / (machines.usd_per_hour or math.inf)
        most = 3600 * hours * machines.num_gpus * machines.gpu.bf16_flops
        flops = bisect_log(exceeds, low=_LEAST_SHARE * most, high=most)
    run = _run_with(flops, goal=goal, machines=machines)
    return None if run is None or run.taken(kind) > 1.01 * amount else run


def patient_run(goal: Goal, ladders: Iterable[Sequence[Machines]]) -> SizedRun:
    """Return the best run of all: of each ladder the fewest machines on which it takes at most 14 days.

    Args:
        ladders: machines of one kind in ascending number.

    Raises: PlanError as `best_run`.
    """
    ladders = list(ladders)
    fewest = [one for ladder in ladders if (one := _fewest(goal, ladder)) is not None]
    return best_run(goal, fewest or [machines for ladder in ladders for machines in ladder])


def _fewest(goal: Goal, group: Sequence[Machines]) -> Machines | None:
    """The fewest machines on which the run takes at most 14 days; if it takes longer on all, the most."""
    last = None
    for number, machines in enumerate(group, start=1):
        if number < len(group) and _least_hours(goal.limit, machines) > PATIENCE_HOURS:
            continue
        run = size_run(goal, machines)
        if run is None:
            if last is not None:
                return last
            continue
        last = machines
        if run.hours.likely <= PATIENCE_HOURS:
            break
    return last


def _least_hours(limit: Limit, machines: Machines) -> float:
    """Hours that a run takes that uses all of the limit; of a number of FLOPs, at the peak."""
    if limit.kind == "flops":
        return limit.amount / machines.num_gpus / machines.gpu.bf16_flops / 3600
    return limit.amount / (machines.usd_per_hour or math.inf) if limit.kind == "usd" else limit.amount


def _run_with(flops: float, *, goal: Goal, machines: Machines) -> SizedRun | None:
    """The best model for so many FLOPs, on some machines; None if it does not fit."""
    scale = goal.law.best_scale(flops, inference_tokens=goal.inference_tokens)
    # Three digits, so that steps of a bisection share shapes; the smallest shape if the best model is smaller.
    shape = llama_shape(int(float(f"{max(1.0, scale.num_parameters):.3g}")), vocab_size=goal.vocab_size)
    num_tokens = flops / 6 / shape.num_parameters
    advice = batch_and_rate(scale)
    world_size = machines.num_gpus
    rows = max(1, round(advice.batch_tokens / goal.seq_len / world_size)) * world_size
    options = [
        option
        for stage, recomputes in _ENGINES
        if (option := _engine(stage, recomputes, rows=rows, shape=shape, goal=goal, machines=machines)) is not None
    ]
    if not options:
        return None
    best = max(options, key=lambda option: option.tokens_per_s)
    return SizedRun(
        goal=goal,
        machines=machines,
        shape=shape,
        num_tokens=max(rows * goal.seq_len, round(num_tokens)),
        learning_rate=float(f"{advice.learning_rate:.2g}"),
        training=best.training,
        batch=best.batch,
        tokens_per_s=with_uncertainty(best.tokens_per_s * world_size, gpu=machines.gpu),
        groups=best.groups,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """Settings of DeepSpeed that fit."""

    training: TrainingSpec
    batch: BatchPlan
    groups: RankGroups
    tokens_per_s: float
    """Of one GPU."""


def _engine(
    stage: int, recomputes: Checkpointing, *, rows: int, shape: LlamaShape, goal: Goal, machines: Machines
) -> _Engine | None:
    """The settings of a ZeRO stage, with groups if these are clearly faster; None if they do not fit."""
    training = _settings(stage, recomputes=recomputes, rows=rows)
    fitting = partial(_fitting_engine, training, rows=rows, model=shape.model_info(), goal=goal, machines=machines)
    best = fitting(groups=NO_GROUPS)
    size = machines.interconnect.gpus_per_node
    # Groups take memory: where nothing fits without them, nothing fits with them.
    if best is None or size == 1 or machines.num_gpus <= size:
        return best
    ranks = {"world_size": machines.num_gpus, "unit": size}
    hpz = possible_hpz(training.zero, **ranks)
    found = possible_shard_groups(training.zero, **ranks, can_choose=True)
    sharded = (option for groups in found if (option := fitting(groups=groups)) is not None)
    options = (fitting(groups=hpz) if hpz is not None else None, next(sharded, None))
    for option in options:
        # As in `plan_world_size`: a step that is shorter by less is not worth their memory.
        if option is not None and best.tokens_per_s < (1 - LEAST_GAIN) * option.tokens_per_s:
            best = option
    return best


def _fitting_engine(
    training: TrainingSpec, *, rows: int, model: ModelInfo, goal: Goal, machines: Machines, groups: RankGroups
) -> _Engine | None:
    """The largest micro-batch and its speed; None if not even one sequence fits."""
    world_size = machines.num_gpus
    state = OptimizerState(sharded_bytes=8 * model.num_parameters, replicated_bytes=0)  # AdamW

    need: Callable[..., MemoryEstimate] = partial(
        estimate_memory,
        model,
        training,
        world_size=world_size,
        seq_len=goal.seq_len,
        is_on_host=False,
        state=state,
        num_copies=num_copies_in_memory(engine="elastic", world_size=world_size),
        has_standby=True,
        groups=groups,
    )
    memory_bytes = machines.gpu.memory_gib * 2**30
    micro = max_micro_batch_size(training, estimate=need, memory_bytes=memory_bytes)
    batch = plan_batch(rows, world_size=world_size, max_micro_batch_size=micro)
    if not need(micro_batch_size=batch.micro_batch_size).fits(memory_bytes):
        return None
    work = step_work(
        model,
        training,
        seq_len=goal.seq_len,
        batch=batch,
        state=state,
        gpu=machines.gpu,
        groups=groups,
    )
    step = estimate_step(work, gpu=machines.gpu, interconnect=machines.interconnect)
    return _Engine(training=training, batch=batch, groups=groups, tokens_per_s=step.tokens_per_s)


@cache
def _settings(stage: int, *, recomputes: Checkpointing, rows: int) -> TrainingSpec:
    values = {"total_steps": 1, "global_batch_size": rows, "zero": {"stage": stage}}
    return TrainingSpec.model_validate(values | {"activation_checkpointing": recomputes})


def _problem(goal: Goal, machines: list[Machines]) -> str:
    """Why no run is possible, and what would be."""
    if not machines:
        return "no machine with a known price has a GPU that computes in bf16; `forge prices` lists what is known"
    runs = [run for one in machines if (run := _run_with(_LEAST_FLOPS, goal=goal, machines=one))]
    least = min((run.taken(goal.limit.kind) for run in runs), default=math.inf)
    if least > goal.limit.amount:
        model = f"the smallest model with a vocabulary of {goal.vocab_size:,}"
        step = Limit(kind=goal.limit.kind, amount=least)
        return f"{goal.limit} is too little: a single step of {model} takes {step}"
    largest = max(machines, key=lambda one: one.num_gpus * one.gpu.memory_gib)
    return f"the best model for {goal.limit} fits on none of the machines, the largest being {largest.name}"
