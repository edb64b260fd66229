"""One rank's life: join the others, build, load, train.

It is told its place by whoever started it (an agent, or Ray Train) and talks back through a Reporter; it
knows nothing of Ray. Where it goes on from is the memory of other machines, if they hold the state, or the
newest checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from forge.checkpoint.intervals import Interval
from forge.checkpoint.manifest import BaseWeights, Progress, base_difference
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.data.loader import HeldOutBatches, TrainBatches
from forge.data.order import SampleOrder
from forge.data.prepare import open_rows
from forge.errors import CheckpointError
from forge.events import CheckpointSkipped, GenerationStarted, Reporter, StepMetrics
from forge.plan.plan import Plan, config_digest
from forge.train.async_checkpoint import AsyncCheckpointer
from forge.train.engine import DTYPES, Engine, Rendezvous, build_engine, join_process_group
from forge.train.loop import LoopResult, SnapshotPolicy, TrainInputs, train
from forge.train.metrics import find_peak
from forge.train.snapshot_interval import SnapshotInterval
from forge.train.snapshotter import ReplicaClient, Snapshotter
from forge.user_code import use_code

T = TypeVar("T")


class StateSource(Protocol):
    """The state of a step in somebody's memory."""

    progress: Progress
    base: BaseWeights | None

    def read(self, wanted: Iterable[tuple[Interval, memoryview]]) -> None:
        """Fill each view with the bytes of its interval."""

    def close(self) -> None:
        """Let go of that memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Where a rank stands. `RANK`, `WORLD_SIZE` and `LOCAL_RANK` are set."""

    rank: int
    world_size: int
    local_world_size: int
    device: str
    """`cpu` or `cuda:0`."""
    num_threads: int | None = None
    """For arithmetic on CPU; by default the machine's cores are divided among the run's ranks on it."""
    checkpoints: str
    """Folder or URL of the run's checkpoints, seen by every rank."""
    generation: int = 1
    rendezvous: Rendezvous | None = None
    """Without one, `MASTER_ADDR` and `MASTER_PORT` are set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticContext:
    """What a generation takes over from those before it, and passes on."""

    keeper: ReplicaClient
    origin: StateSource | None = None
    on_progress: Callable[[], None] = lambda: None


def run_worker(
    plan: Plan,
    place: WorkerContext,
    reporter: Reporter,
    *,
    inheritance: ElasticContext | None = None,
    clock: Stopwatch | None = None,
) -> LoopResult:
    """Train a plan at one world size, from memory or from its newest checkpoint that verifies; collective.

    Args:
        inheritance: of a run whose generations follow one another.
        clock: runs since the rank was asked for.

    Raises: RunError, CheckpointError, DataError, PlanError, UserCodeError.
    """
    clock = clock or Stopwatch()
    use_code(plan.code.digest if plan.code is not None else None)
    if inheritance is not None:
        clock.on_lap = inheritance.on_progress
    device = torch.device(place.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(place.num_threads or max(1, (os.cpu_count() or 1) // place.local_world_size))
    join_process_group(device=device, rendezvous=place.rendezvous)
    clock.lap("rendezvous")

    origin = inheritance.origin if inheritance else None
    engine = _build(plan, place, device=device, skip_init=origin is not None)
    clock.lap("build")
    start = _take_over(engine, origin) if origin else _load_newest(engine, place.checkpoints, plan, reporter)
    clock.lap("load")
    peak = find_peak(device, dtype=DTYPES[plan.job.training.precision])
    clock.lap("measure")
    copier = Snapshotter(engine.state, keeper=inheritance.keeper) if inheritance else None
    keeper = inheritance.keeper if inheritance else None
    saving = AsyncCheckpointer(
        engine.state,
        url=place.checkpoints,
        keep=plan.job.checkpoint.keep,
        copier=copier,
        unacked_metrics=lambda: keeper.metadata().get("metrics", ()) if keeper else (),
    )
    engine.before_update = saving.settle
    if inheritance is not None:
        engine.on_progress = saving.on_wait = inheritance.on_progress
    every = plan.job.checkpoint.snapshot_every
    pace = SnapshotInterval(fixed=None if every == "auto" else every)

    def tell_formed() -> None:
        clock.lap("first step")
        reporter.event(
            GenerationStarted(
                generation=place.generation,
                world_size=place.world_size,
                device=str(device),
                peak_flops=peak.flops,
                peak_source=peak.source,
                seconds=clock.laps,
            )
        )

    is_drained = False
    try:
        ending = train(
            engine,
            _train_inputs(plan, place, peak_flops=peak.flops),
            start=start,
            saving=saving,
            snapshots=SnapshotPolicy(snapshotter=copier, interval=pace) if copier else None,
            on_started=tell_formed,
            reporter=reporter,
        )
        is_drained = ending.is_drained
        return ending
    finally:
        if not is_drained:  # otherwise a checkpoint that is in the making is finished by its savers alone
            saving.close()


def _build(plan: Plan, place: WorkerContext, *, device: torch.device, skip_init: bool) -> Engine:
    """The engine of one world size; collective."""
    return build_engine(
        plan.job.model,
        plan.job.training,
        deepspeed_config=plan.for_world_size(place.world_size).deepspeed,
        vocab_size=plan.corpus.vocab_size,
        seq_len=plan.job.data.seq_len,
        eot_id=plan.corpus.eot_id,
        device=device,
        skip_init=skip_init,
        has_linear_head=plan.model.has_linear_head,
    )


def _take_over(engine: Engine, origin: StateSource) -> Progress:
    """Fill this rank's state from memory; collective.

    Raises: CheckpointError if it is not all there, or its base weights have changed since.
    """
    difference = base_difference(origin.base, engine.state.shape.base)
    if difference is not None:
        raise CheckpointError(f"the run cannot go on: {difference}. Restore the file and resume the run")
    engine.state.read(origin)
    origin.close()
    engine.state.resume(step=origin.progress.step)
    return origin.progress


def _train_inputs(plan: Plan, place: WorkerContext, *, peak_flops: float) -> TrainInputs:
    """What this worker trains and evaluates on. Raises: DataError if the prepared corpus cannot be opened."""
    job, world = plan.job, plan.for_world_size(place.world_size)
    train_rows, held_out_rows = open_rows(plan.corpus)
    return TrainInputs(
        training=job.training,
        checkpoint=job.checkpoint,
        total_steps=plan.total_steps,
        pause_at=plan.pause_at,
        batches=TrainBatches(
            rows=train_rows,
            order=SampleOrder(num_samples=train_rows.num_rows, seed=job.data.seed),
            plan=world.batch,
            rank=place.rank,
        ),
        held_out=HeldOutBatches(
            rows=held_out_rows,
            rank=place.rank,
            world_size=place.world_size,
            micro_batch_size=world.batch.micro_batch_size,
        ),
        flops_per_token=plan.flops_per_token,
        peak_flops=peak_flops,
    )


def _load_newest(engine: Engine, url: str, plan: Plan, reporter: Reporter) -> Progress:
    """Load the newest checkpoint that verifies; step 0 if there is none. Collective.

    Every rank reads what it needs and no more; of the checksums each verifies its share.
    Raises: CheckpointError if it is of another job, or cannot be read.
    """
    digest, corpus = config_digest(plan.job, code=plan.code), plan.corpus.digest
    share = dist.get_rank(), dist.get_world_size()
    storage = open_storage(url)
    for name in _agreed(lambda: list_checkpoints(storage))[0]:
        found = _agreed(partial(verify_checkpoint, storage, name, share=share))
        problem = next((problem for problem in found if problem), None)
        if problem is not None:
            reporter.event(CheckpointSkipped(folder=f"{url}/{name}", reason=problem))
            continue
        checkpoint = open_checkpoint(storage, name)
        checkpoint.require_job(config_digest=digest, corpus=corpus, shape=engine.state.shape)
        _agreed(partial(engine.state.read, checkpoint))
        engine.state.resume(step=checkpoint.progress.step)
        for (
            metrics
        ) in checkpoint.unacked_metrics:  # whoever recorded the run may have died before they were written
            reporter.resend(StepMetrics(**metrics))
        return checkpoint.progress
    return Progress(step=0, num_tokens=0, config_digest=digest, corpus=corpus)


def _agreed(attempt: Callable[[], T]) -> list[T]:
    """Every rank's answer, on every rank; collective. Raises: CheckpointError on all of them if one raised it."""
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
    """Seconds by part, for the report of what forming took."""

    def __init__(self, *, began: float | None = None, laps: Mapping[str, float] | None = None) -> None:
        """Args:
        began: when the part that runs began, by `time.monotonic`.
        laps: the parts before it.
        """
        self.laps: dict[str, float] = dict(laps or {})
        self.on_lap: Callable[[], None] = lambda: None
        self._last = time.monotonic() if began is None else began

    def lap(self, name: str) -> None:
        """A part has ended, and the next begins."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
        self.on_lap()
