"""Main function of a worker (one rank): join the process group, build the model, load the state, train.

The process that starts it (an agent, or Ray Train) passes a `WorkerContext` and a `Reporter`; this module does not
depend on Ray. The state comes from the memory of other machines, if they have a replica, or from the newest
checkpoint. The module is long because it shows all parts of a worker's start in their order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from forge.checkpoint.intervals import Interval
from forge.checkpoint.manifest import BaseWeights, Progress, base_difference
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.source import source_problem, weights_digest
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.data.loader import HeldOutBatches, TrainBatches
from forge.data.mixture_order import build_order
from forge.data.prepare import open_rows
from forge.errors import CheckpointError
from forge.events import CheckpointSkipped, GenerationStarted, Reporter, StepMetrics
from forge.limits import usable_cpus
from forge.model.families.base import DataShape
from forge.objective.base import ObjectiveContext
from forge.objective.build import build_objective
from forge.plan.checkpoint_interval import CheckpointRisk, planned_every, planned_risk
from forge.plan.curve import run_digest
from forge.plan.inputs import InitInfo
from forge.plan.plan import Plan
from forge.plan.speed import attention_choice, compile_choice, head_size, liger_choice
from forge.train.async_checkpoint import AsyncCheckpointer
from forge.train.attention import agree_on_attention
from forge.train.checkpoint_interval import CheckpointInterval
from forge.train.cuda import create_context, device_name
from forge.train.engine import DTYPES, Engine, build_engine
from forge.train.frozen_model import build_frozen, build_teacher
from forge.train.liger import use_liger
from forge.train.loop import LoopResult, SnapshotPolicy, TrainInputs, train
from forge.train.peak import find_peak
from forge.train.process_group import Rendezvous, join_process_group
from forge.train.quantized_gradients import agree_on_quantized_gradients
from forge.train.snapshot_interval import SnapshotInterval
from forge.train.snapshotter import ReplicaClient, Snapshotter
from forge.train.task_scores import build_scorer
from forge.user_code import use_code

if TYPE_CHECKING:
    from forge.train.layer_compiler import LayerCompiler

T = TypeVar("T")


class StateSource(Protocol):
    """The state of a step in the memory of agents."""

    progress: Progress
    base: BaseWeights | None

    def read(self, wanted: Iterable[tuple[Interval, memoryview]]) -> None:
        """Fill each view with the bytes of its interval."""

    def close(self) -> None:
        """Close the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Identity and resources of a worker. `RANK`, `WORLD_SIZE` and `LOCAL_RANK` must be set too."""

    rank: int
    world_size: int
    local_world_size: int
    device: str
    """`cpu` or `cuda:0`."""
    num_threads: int | None = None
    """Threads of torch on CPU; by default the machine's cores are divided among its ranks."""
    checkpoints: str
    """Folder or URL of the run's checkpoints, shared by all ranks."""
    generation: int = 1
    rendezvous: Rendezvous | None = None
    """None: `MASTER_ADDR` and `MASTER_PORT` are used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticContext:
    """Replicas of the state that connect a generation to the previous and the next one."""

    replica_client: ReplicaClient
    state_source: StateSource | None = None
    parts_per_shard: int = 0
    """See `forge.train.snapshot_pieces`."""
    checkpoint_risk: CheckpointRisk | None = None
    """With `checkpoint.every: auto`, what the run has measured."""
    on_progress: Callable[[], None] = lambda: None
    on_own_time: Callable[[float, str], None] | None = None
    """Takes the seconds of a rank's own work in a step (`forge.train.local_time`), and the name of its device."""


def run_worker(
    plan: Plan,
    context: WorkerContext,
    reporter: Reporter,
    *,
    elastic: ElasticContext | None = None,
    clock: Stopwatch | None = None,
) -> LoopResult:
    """Train a plan at one world size, from memory or from its newest checkpoint that verifies; collective.

    Args:
        elastic: replica client and state source, under the elastic engine.
        clock: started when the rank was requested.

    Raises: RunError, CheckpointError, DataError, PlanError, UserCodeError.
    """
    clock = clock or Stopwatch()
    enter_working_folder(plan)
    use_code(plan.code.digest if plan.code is not None else None)
    if elastic is not None:
        clock.on_lap = elastic.on_progress
    device = _use_device(context, clock=clock)
    join_process_group(device=device, rendezvous=context.rendezvous)
    clock.lap("rendezvous")
    state_source = elastic.state_source if elastic else None
    attention = _attention(plan, context, device=device, reporter=reporter)
    engine = _build(plan, context, device=device, source=state_source, attention=attention, reporter=reporter)
    compiler = _speed_up_layers(engine, plan, context, reporter=reporter, on_progress=clock.on_lap)
    clock.lap("build")
    start = _load(engine, plan, context, state_source=state_source, reporter=reporter)
    clock.lap("load")
    peak = find_peak(device, dtype=DTYPES[plan.job.training.precision])
    clock.lap("measure")

    def report_started() -> None:
        clock.lap("first step")
        reporter.event(
            GenerationStarted(
                generation=context.generation,
                world_size=context.world_size,
                device=str(device),
                peak_flops=peak.flops,
                peak_source=peak.source,
                seconds=clock.laps,
            )
        )
        if compiler is not None:
            compiler.report()

    snapshots = _snapshot_policy(engine, plan, elastic) if elastic is not None else None
    checkpointer = _checkpointer(engine, plan, context, elastic=elastic, snapshots=snapshots)
    is_drained = False
    try:
        result = train(
            engine,
            _train_inputs(plan, context, engine, peak_flops=peak.flops, elastic=elastic),
            start=start,
            checkpointer=checkpointer,
            snapshots=snapshots,
            on_started=report_started,
            reporter=reporter,
        )
        is_drained = result.is_drained
        return result
    finally:
        if not is_drained:  # otherwise the writer processes complete a pending checkpoint on their own
            checkpointer.close()


def enter_working_folder(plan: Plan) -> None:
    """Make relative paths in the job mean what they mean in the plan; Ray starts its processes elsewhere.

    On another machine the folder may not exist, and only absolute paths can be used.
    """
    if plan.files is not None and plan.files.folder and Path(plan.files.folder).is_dir():
        os.chdir(plan.files.folder)


def _use_device(context: WorkerContext, *, clock: Stopwatch) -> torch.device:
    """Select the device of this rank; on a CPU, its share of the cores."""
    device = torch.device(context.device)
    if device.type == "cuda":
        create_context(device)
        clock.lap("CUDA context")
    else:
        torch.set_num_threads(context.num_threads or max(1, usable_cpus() // context.local_world_size))
    return device


def _snapshot_policy(engine: Engine, plan: Plan, elastic: ElasticContext) -> SnapshotPolicy:
    every = plan.job.checkpoint.snapshot_every
    return SnapshotPolicy(
        snapshotter=Snapshotter(
            engine.state, replica_client=elastic.replica_client, parts_per_shard=elastic.parts_per_shard
        ),
        interval=SnapshotInterval(fixed=None if every == "auto" else every),
    )


def _checkpointer(
    engine: Engine,
    plan: Plan,
    context: WorkerContext,
    *,
    elastic: ElasticContext | None,
    snapshots: SnapshotPolicy | None,
) -> AsyncCheckpointer:
    """Build the checkpointer, and connect the engine's waits to it and to the supervisor's watch for hangs."""
    checkpointer = AsyncCheckpointer(
        engine.state,
        url=context.checkpoints,
        keep=plan.job.checkpoint.keep,
        keep_best=plan.job.checkpoint.keep_best or 0,
        snapshotter=snapshots.snapshotter if snapshots is not None else None,
        unacked_metrics=lambda: elastic.replica_client.metadata().get("metrics", ()) if elastic is not None else (),
    )
    engine.before_update = checkpointer.settle
    if elastic is not None and elastic.parts_per_shard and snapshots is not None:
        engine.before_reduce = snapshots.snapshotter.complete
    if elastic is not None:
        engine.on_progress = checkpointer.on_wait = elastic.on_progress
        if elastic.on_own_time is not None:
            engine.own_time.on_step = _with_device(elastic.on_own_time, engine.device)
    return checkpointer


def _with_device(report: Callable[[float, str], None], device: torch.device) -> Callable[[float], None]:
    name = device_name(device)
    return lambda seconds: report(seconds, name)


def _attention(plan: Plan, context: WorkerContext, *, device: torch.device, reporter: Reporter) -> str | None:
    """Choose how attention is computed; collective. Raises: RunError."""
    world = plan.for_world_size(context.world_size)
    degree = world.batch.sequence_parallel_size
    choice = attention_choice(plan.job, model=plan.model, device=device.type, sequence_parallel_size=degree)
    return agree_on_attention(choice, head_size=head_size(plan.model), device=device, reporter=reporter)


def _build(
    plan: Plan,
    context: WorkerContext,
    *,
    device: torch.device,
    source: StateSource | None,
    attention: str | None,
    reporter: Reporter,
) -> Engine:
    """Build the engine for one world size; collective."""
    for init in (plan.init, plan.adapters_init):
        if init is not None and source is None:
            _verify_init(init, checkpoints=context.checkpoints)
    world = plan.for_world_size(context.world_size)
    return build_engine(
        plan.job.model,
        plan.job.training,
        deepspeed_config=agree_on_quantized_gradients(world.deepspeed, reporter=reporter),
        sequence_parallel_size=world.batch.sequence_parallel_size,
        num_shard_groups=world.groups.num_shard_groups,
        data=DataShape.of(plan),
        objective=build_objective(
            plan.job.training.objective, context=_objective_context(plan, device=device, attention=attention)
        ),
        attention=attention,
        device=device,
        skip_init=source is not None,
        has_linear_head=plan.model.has_linear_head,
        pins_base=plan.job.holds_reference,
    )


def _speed_up_layers(
    engine: Engine,
    plan: Plan,
    context: WorkerContext,
    *,
    reporter: Reporter,
    on_progress: Callable[[], None],
) -> LayerCompiler | None:
    """Use Liger's kernels, or have the layers compiled in the first step, if the plan says so."""
    if liger_choice(plan.job, model=plan.model, device=engine.device.type).is_on:
        use_liger(engine.model)
    degree = plan.for_world_size(context.world_size).batch.sequence_parallel_size
    device = plan.hardware.device
    if not compile_choice(plan.job, model=plan.model, device=device, sequence_parallel_size=degree).is_on:
        return None
    from forge.train.layer_compiler import (
        LayerCompiler,
        prepare_compiler,
    )  # torch._inductor takes seconds to import

    prepare_compiler(num_ranks=context.local_world_size)
    compiler = LayerCompiler(engine.model, reporter=reporter, on_progress=on_progress)
    if engine.has_dropout:  # of a class of the user
        compiler.give_up("the masks of dropout are drawn for each sample in Python")
    return compiler


def _objective_context(plan: Plan, *, device: torch.device, attention: str | None) -> ObjectiveContext:
    job, training, data = plan.job, plan.job.training, DataShape.of(plan)
    build: dict[str, Any] = {"dtype": DTYPES[training.precision], "device": device}
    return ObjectiveContext(
        training=training,
        tokenizer=Path(plan.corpus.folder) / "tokenizer",
        has_positionwise_head=plan.model.has_positionwise_head,
        keeps_examples_apart=plan.model.isolation_problem is None,
        labels=plan.corpus.labels,
        vocab_size=plan.corpus.vocab_size,
        teacher=build_teacher(training.distillation, data, **build) if job.holds_teacher else None,
        reference=build_frozen(job.model, data, seed=training.seed, attention=attention, **build)
        if job.holds_reference
        else None,
    )


def _verify_init(init: InitInfo, *, checkpoints: str) -> None:
    """Verify the checkpoint or adapter folder that a run starts from, before its first step; collective, each rank
    its share.

    Args:
        checkpoints: of the run itself; once it has any, its state comes from there.

    Raises: CheckpointError if it is damaged, or another one than the plan was made for.
    """
    share = dist.get_rank(), dist.get_world_size()
    if _all_gather(lambda: list_checkpoints(open_storage(checkpoints)))[0]:
        return
    digests = _all_gather(partial(weights_digest, init.source))
    if set(digests) != {init.digest}:
        raise CheckpointError(f"{init.source} has other content than when the plan was made; plan the job again")
    if init.step is None:
        return  # a folder, all of whose bytes are in the digest
    problems = _all_gather(partial(source_problem, init.source, share=share))
    problem = next((problem for problem in problems if problem), None)
    if problem is not None:
        raise CheckpointError(f"{init.source}: {problem}")


def _load(
    engine: Engine, plan: Plan, context: WorkerContext, *, state_source: StateSource | None, reporter: Reporter
) -> Progress:
    """Load the state from memory if it is there, else the newest checkpoint; collective."""
    if state_source is not None:
        return _load_from_memory(engine, state_source)
    return _load_newest(engine, context.checkpoints, plan, reporter)


def _load_from_memory(engine: Engine, source: StateSource) -> Progress:
    """Load this rank's state from memory; collective.

    Raises: CheckpointError if it is incomplete, or the base weights have changed since.
    """
    difference = base_difference(source.base, engine.state.shape.base)
    if difference is not None:
        raise CheckpointError(f"the run cannot continue: {difference}. Restore the file and resume the run")
    engine.state.read(source)
    source.close()
    engine.state.resume(step=source.progress.step)
    return source.progress


def _train_inputs(
    plan: Plan, context: WorkerContext, engine: Engine, *, peak_flops: float, elastic: ElasticContext | None
) -> TrainInputs:
    """Collect the loop's batches and settings. Raises: DataError if the prepared corpus cannot be opened."""
    job, world = plan.job, plan.for_world_size(context.world_size)
    train_rows, held_out_rows = open_rows(plan.corpus)
    return TrainInputs(
        training=job.training,
        checkpoint=job.checkpoint,
        checkpoint_interval=_checkpoint_interval(plan, context, risk=elastic.checkpoint_risk if elastic else None),
        total_steps=plan.total_steps,
        schedule_steps=plan.schedule_steps,
        former_lengths=plan.former_lengths,
        pause_at=plan.pause_at,
        batches=TrainBatches(
            rows=train_rows,
            order=build_order(job.data, plan.corpus),
            plan=world.batch,
            rank=context.rank,
        ),
        held_out=HeldOutBatches(
            rows=held_out_rows,
            rank=context.rank // world.batch.sequence_parallel_size,
            world_size=world.batch.num_groups,
            micro_batch_size=world.batch.micro_batch_size,
            parts={part.name: part.corpus.num_held_out_sequences for part in plan.corpus.parts},
        ),
        tasks=build_scorer(plan, device=engine.device, on_progress=lambda: engine.on_progress()),
        flops_per_token=plan.flops_per_token,
        peak_flops=peak_flops,
    )


def _checkpoint_interval(plan: Plan, context: WorkerContext, *, risk: CheckpointRisk | None) -> CheckpointInterval:
    every = planned_every(plan, world_size=context.world_size)
    if plan.job.checkpoint.every != "auto":
        return CheckpointInterval(every)
    planned = planned_risk(plan, world_size=context.world_size)
    return CheckpointInterval(every, risk=risk or replace(planned, cost_s=None))


def _load_newest(engine: Engine, url: str, plan: Plan, reporter: Reporter) -> Progress:
    """Load the newest checkpoint that verifies; step 0 if there is none. Collective.

    Every rank reads only what it needs, and verifies its share of the checksums.
    Raises: CheckpointError if it is of another job, or cannot be read.
    """
    digest, corpus = run_digest(plan), plan.corpus.digest
    share = dist.get_rank(), dist.get_world_size()
    storage = open_storage(url)
    for name in _all_gather(lambda: list_checkpoints(storage))[0]:
        found = _all_gather(partial(verify_checkpoint, storage, name, share=share))
        problem = next((problem for problem in found if problem), None)
        if problem is not None:
            reporter.event(CheckpointSkipped(folder=f"{url}/{name}", reason=problem))
            continue
        checkpoint = open_checkpoint(storage, name)
        checkpoint.require_job(config_digest=digest, corpus=corpus, shape=engine.state.shape)
        _all_gather(partial(engine.state.read, checkpoint))
        engine.state.resume(step=checkpoint.progress.step)
        for metrics in checkpoint.unacked_metrics:  # the recorder may have died before it wrote them
            reporter.resend(StepMetrics(**metrics))
        return checkpoint.progress
    return Progress(step=0, num_tokens=0, config_digest=digest, corpus=corpus)


def _all_gather(attempt: Callable[[], T]) -> list[T]:
    """Call on every rank and return all results; collective. Raises: CheckpointError on all ranks if one fails."""
    answer: T | None = None
    failure: str | None = None
    try:
        answer = attempt()
    except CheckpointError as error:
        failure = str(error)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (answer, failure))
    for _, reason in every:
        if reason is not None:
            raise CheckpointError(reason)
    return [answer for answer, _ in every]


class Stopwatch:
    """Measures the phases of starting a generation."""

    def __init__(self, *, began: float | None = None, laps: Mapping[str, float] | None = None) -> None:
        """Args:
        began: start of the current phase, by `time.monotonic`.
        laps: seconds of earlier phases, by name.
        """
        self.laps: dict[str, float] = dict(laps or {})
        self.on_lap: Callable[[], None] = lambda: None
        self._last = time.monotonic() if began is None else began

    def lap(self, name: str) -> None:
        """End the current phase, and begin the next."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
        self.on_lap()
