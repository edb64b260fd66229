"""Checkpoints of a small made-up model, written by the real writer code in this process, without torch."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from forge.checkpoint.intervals import Interval, Layout, pack
from forge.checkpoint.manifest import ModelShape, Parameter, Progress, state_bytes
from forge.checkpoint.snapshot_buffer import SnapshotBuffer, create_snapshot_buffer
from forge.checkpoint.storage import open_storage
from forge.checkpoint.writer_process import CommandStream, WriteCommand, save

SHAPES = {"embedding.weight": (10, 6), "norm.weight": (7,), "head/odd name.weight": (3, 5)}
TRAINED = ("master", "exp_avg", "exp_avg_sq")


def model_shape(**changes: tuple[int, ...] | None) -> ModelShape:
    """The small model's tensors; changes: another shape by name, None for no such parameter."""
    shapes = {name: shape for name, shape in (SHAPES | changes).items() if shape is not None}
    parameters = {name: Parameter(shape=shape, dtype="BF16", kind="master") for name, shape in shapes.items()}
    return ModelShape(parameters=parameters, tied={}, config={})


def progress(step: int, *, config_digest: str = "recipe", corpus: str = "corpus") -> Progress:
    return Progress(step=step, num_tokens=100 * step, config_digest=config_digest, corpus=corpus)


def values(interval: Interval, *, step: int) -> np.ndarray:
    """Numbers that tell where they belong."""
    seed = zlib.crc32(f"{interval.kind}/{interval.name}/{step}".encode()) % 9973
    return (seed + np.arange(interval.start, interval.stop)).astype("<f4")


def layout_of(rank: int, world_size: int) -> Layout:
    """The rank's share of every parameter, in every kind."""
    intervals = []
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        start, stop = rank * size // world_size, (rank + 1) * size // world_size
        intervals += [Interval(kind=kind, name=name, start=start, stop=stop, dtype="F32") for kind in TRAINED]
    return pack(intervals)


def snapshot_of(rank: int, world_size: int, *, step: int, slot: int = 0) -> SnapshotBuffer:
    """What a rank would have copied after a step."""
    snapshot = create_snapshot_buffer(layout_of(rank, world_size))
    fill(snapshot, step=step, slot=slot)
    return snapshot


def fill(snapshot: SnapshotBuffer, *, step: int, slot: int = 0) -> None:
    """Write a step's numbers into one slot."""
    with snapshot.begin(slot) as data:
        for interval, offset in snapshot.layout.with_offsets():
            data[offset : offset + interval.size_bytes] = values(interval, step=step).tobytes()
    snapshot.commit(slot, step=step, state={"step": step})


def command_for(url: str, step: int, rank: int, world_size: int, **changes: object) -> WriteCommand:
    body = {
        "url": url,
        "step": step,
        "slot": 0,
        "rank": rank,
        "world_size": world_size,
        "token": f"aaaaaaaa{step:04x}",
        "keep": 3,
        "state": state_bytes(progress(step), model_shape()).decode(),
    }
    return WriteCommand(**(body | changes))


@contextmanager
def open_commands() -> Iterator[CommandStream]:
    """Orders whose sender lives, and sends none."""
    receiving, sending = os.pipe()
    try:
        yield CommandStream(receiving)
    finally:
        os.close(receiving)
        os.close(sending)


def write(url: str, step: int, *, world_size: int = 2, **changes: object) -> None:
    """Write a checkpoint, the parts one after the other; the first rank seals last.

    Raises: what the writer of the first rank raised.
    """
    storage = open_storage(url, patience_s=20)
    with open_commands() as commands, Path(os.devnull).open("wb") as nowhere:
        for rank in reversed(range(world_size)):
            snapshot = snapshot_of(rank, world_size, step=step)
            command = command_for(url, step, rank, world_size, **changes)
            save(storage, snapshot, command, commands, outcome_fd=nowhere.fileno())
            snapshot.close()


def as_record(command: WriteCommand) -> dict[str, object]:
    return asdict(command)
