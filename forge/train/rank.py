"""One rank's life: join the others, build, load, train.

It is told its place by whoever started it (Ray Train today) and talks back through a Reporter; it
knows nothing of Ray.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from forge.data.batches import HeldOutBatches, TrainBatches
from forge.data.order import SampleOrder
from forge.data.prepare import open_streams
from forge.errors import RunError
from forge.events import CheckpointSkipped, GenerationFormed, Reporter
from forge.plan.plan import Plan, training_digest
from forge.train.checkpoint import Progress, Saved, find_checkpoint, load_checkpoint, save_checkpoint
from forge.train.engine import DTYPES, Engine, build_engine, join_process_group
from forge.train.loop import Curriculum, train
from forge.train.metrics import find_peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands. `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT` are set."""

    rank: int
    world_size: int
    local_world_size: int
    device: str
    """`cpu` or `cuda:0`."""
    checkpoints: str
    """Folder of the run's checkpoints, seen by every rank."""


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
    root = Path(place.checkpoints)
    start = _load_newest(engine, root, plan, reporter)
    clock.lap("load")
    peak = find_peak(device, dtype=DTYPES[job.training.precision])
    train_stream, held_out_stream = open_streams(plan.corpus)
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

    def save(progress: Progress) -> Saved:
        return save_checkpoint(root, engine.state, progress, keep=job.checkpoint.keep)

    curriculum = Curriculum(
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
        peak_flops=peak.flops,
    )
    return train(engine, curriculum, start=start, save=save, reporter=reporter)


def _load_newest(engine: Engine, root: Path, plan: Plan, reporter: Reporter) -> Progress:
    """Every rank loads the checkpoint that rank 0 found; step 0 if there is none."""
    assert plan.corpus is not None
    found: list[Path | None] = [None]
    if dist.get_rank() == 0:
        found[0] = find_checkpoint(
            root, on_skip=lambda folder, why: reporter.event(CheckpointSkipped(folder=str(folder), reason=why))
        )
    dist.broadcast_object_list(found, src=0)
    recipe = training_digest(plan.job)
    if found[0] is None:
        return Progress(step=0, num_tokens=0, recipe=recipe, corpus=plan.corpus.digest)
    return load_checkpoint(found[0], engine.state, recipe=recipe, corpus=plan.corpus.digest)


class _Stopwatch:
    """Seconds by part, for the report of what forming took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
