"""The values of a checkpoint as tensors, a few at a time: no optimizer, no ranks, never the whole model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from forge.checkpoint.intervals import Interval
from forge.checkpoint.reader import Checkpoint
from forge.errors import CheckpointError
from forge.train.state import DTYPE_NAMES, bytes_of

_BATCH_BYTES = 256 * 2**20
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""torch's types by safetensors' names."""


def require_average(checkpoint: Checkpoint, *, ema: bool) -> None:
    """Raises: CheckpointError if averages are wanted and there are none."""
    if ema and "ema" not in checkpoint.kinds:
        raise CheckpointError(f"{checkpoint.url} holds no ema weights: the job has no training.ema")


def read_tensors(checkpoint: Checkpoint, *, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, in the type it is kept in; a few hundred MiB are read and held at a time.

    Raises: CheckpointError if they cannot be read.
    """
    batch: dict[str, tuple[Interval, Tensor]] = {}
    size = 0
    names = list(checkpoint.shape.parameters)
    for name in names:
        interval = checkpoint.value_interval(name, ema=ema)
        batch[name] = interval, torch.empty(checkpoint.shape.parameters[name].shape, dtype=DTYPES[interval.dtype])
        size += interval.size_bytes
        if size >= _BATCH_BYTES or name == names[-1]:
            checkpoint.read((interval, bytes_of(tensor.view(-1))) for interval, tensor in batch.values())
            yield from ((name, tensor) for name, (_, tensor) in batch.items())
            batch, size = {}, 0


def read_pieces(checkpoint: Checkpoint, interval: Interval, *, max_numel: int) -> Iterator[Tensor]:
    """The elements of an interval in order, a flat tensor of at most `max_numel` at a time.

    Raises: CheckpointError if they cannot be read.
    """
    for start in range(interval.start, interval.stop, max_numel):
        stop = min(start + max_numel, interval.stop)
        piece = torch.empty(stop - start, dtype=DTYPES[interval.dtype])
        part = Interval(kind=interval.kind, name=interval.name, start=start, stop=stop, dtype=interval.dtype)
        checkpoint.read([(part, bytes_of(piece))])
        yield piece
