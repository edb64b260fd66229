"""One rank's life: join the others, build, load, train.

It is told its place by whoever started it (Ray Train today) and talks back through a Reporter; it
knows nothing of Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from forge.data.batches import HeldOutBatches, TrainBatches
from forge.data.order import SampleOrder
from forge.data.prepare import open_streams
from forge.errors import CheckpointError, RunError
from forge.events import CheckpointSkipped, GenerationFormed, Reporter
from forge.plan.plan import Plan, training_digest
from forge.train.checkpoint import list_checkpoints, open_checkpoint, verify_checkpoint
from forge.train.engine import DTYPES, Engine, build_engine, join_process_group
from forge.train.loop import Curriculum, train
from forge.train.manifest import Progress
from forge.train.metrics import find_peak
from forge.train.saving import Saving
from forge.train.storage import open_storage

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands. `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT` are set."""

    rank: int
    world_size: int
    local_world_size: int
    device: str
    """`cpu` or `cuda:0`."""
    checkpoints: str
    """Folder or URL of the run's checkpoints, seen by every rank."""


def run_rank(plan: Plan, place: Place, reporter: Reporter) -> Progress:
    """Train a plan at one world size, from its newest checkpoint that verifies; collective.

    Raises: RunError, CheckpointError, DataError, PlanError.
    """
    if plan.corpus is None:
        raise RunError("this plan has no corpus: it was made for a dry run")
    clock = _Stopwatch()
    device = torch.device(place.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world_size))
    join_process_group(device=device)
    clock.lap("rendezvous")

    job, world = plan.job, plan.world(place.world_size)
    engine = build_engine(
        job.model,
        job.training,
        deepspeed_config=world.deepspeed,
        vocab_size=plan.corpus.vocab_size,
        seq_len=job.data.seq_len,
        eot_id=plan.corpus.eot_id,
        device=device,
    )
    clock.lap("build")
    start = _load_newest(engine, place.checkpoints, plan, reporter)
    clock.lap("load")
    peak = find_peak(device, dtype=DTYPES[job.training.precision])
    clock.lap("measure")
    reporter.event(
        GenerationFormed(
            generation=1,
            world_size=place.world_size,
            device=str(device),
            peak_flops=peak.flops,
            peak_source=peak.source,
            seconds=clock.laps,
        )
    )

    curriculum = _curriculum(plan, place, peak_flops=peak.flops)
    saving = Saving(engine.state, url=place.checkpoints, keep=job.checkpoint.keep)
    engine.before_update = saving.settle
    try:
        return train(engine, curriculum, start=start, saving=saving, reporter=reporter)
    finally:
        saving.close()


def _curriculum(plan: Plan, place: Place, *, peak_flops: float) -> Curriculum:
    """What this rank trains and evaluates on. Raises: DataError if the prepared corpus cannot be opened."""
    assert plan.corpus is not None
    job, world = plan.job, plan.world(place.world_size)
    train_stream, held_out_stream = open_streams(plan.corpus)
    return Curriculum(
        training=job.training,
        checkpoint=job.checkpoint,
        total_steps=plan.total_steps,
        batches=TrainBatches(
            stream=train_stream,
            order=SampleOrder(num_samples=plan.corpus.num_train_sequences, seed=job.data.seed),
            plan=world.batch,
            rank=place.rank,
            seq_len=job.data.seq_len,
        ),
        held_out=HeldOutBatches(
            stream=held_out_stream,
            rank=place.rank,
            world_size=place.world_size,
            micro_batch_size=world.batch.micro_batch_size,
            seq_len=job.data.seq_len,
        ),
        flops_per_token=plan.flops_per_token,
        peak_flops=peak_flops,
    )


def _load_newest(engine: Engine, url: str, plan: Plan, reporter: Reporter) -> Progress:
    """Load the newest checkpoint that verifies; step 0 if there is none. Collective.

    Every rank reads what it needs and no more; of the checksums each verifies its share.
    Raises: CheckpointError if it is of another job, or cannot be read.
    """
    assert plan.corpus is not None
    recipe, corpus = training_digest(plan.job), plan.corpus.digest
    share = dist.get_rank(), dist.get_world_size()
    storage = open_storage(url)
    for name in _agreed(lambda: list_checkpoints(storage))[0]:
        found = _agreed(partial(verify_checkpoint, storage, name, share=share))
        problem = next((problem for problem in found if problem), None)
        if problem is not None:
            reporter.event(CheckpointSkipped(folder=f"{url}/{name}", reason=problem))
            continue
        checkpoint = open_checkpoint(storage, name)
        checkpoint.require_job(recipe=recipe, corpus=corpus, shape=engine.state.shape)
        _agreed(partial(engine.state.read, checkpoint))
        engine.state.resume(step=checkpoint.progress.step)
        return checkpoint.progress
    return Progress(step=0, num_tokens=0, recipe=recipe, corpus=corpus)


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


class _Stopwatch:
    """Seconds by part, for the report of what forming took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
