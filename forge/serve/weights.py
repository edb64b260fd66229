"""The values of a checkpoint as tensors, one at a time: no optimizer, no ranks, never the whole model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from forge.errors import CheckpointError
from forge.train.checkpoint import Checkpoint
from forge.train.interval import Interval
from forge.train.state import DTYPE_NAMES, bytes_of

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""torch's types by safetensors' names."""


def require_average(checkpoint: Checkpoint, *, ema: bool) -> None:
    """Raises: CheckpointError if averages are wanted and there are none."""
    if ema and "ema" not in checkpoint.kinds:
        raise CheckpointError(f"{checkpoint.url} holds no ema weights: the job has no training.ema")


def read_tensor(checkpoint: Checkpoint, name: str, *, ema: bool = False) -> Tensor:
    """One whole parameter or buffer, in the type it is kept in.

    Raises: CheckpointError if it cannot be read.
    """
    interval = checkpoint.value_interval(name, ema=ema)
    flat = torch.cat(list(read_pieces(checkpoint, interval, max_numel=max(1, interval.numel))))
    return flat.view(checkpoint.shape.parameters[name].shape)


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
