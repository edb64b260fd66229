"""Read the weights of a checkpoint as tensors, a few at a time, without the optimizer state.

Frozen parameters that the checkpoint only refers to are read from their base weights, after a check of the digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from forge.checkpoint.intervals import Interval
from forge.checkpoint.reader import Checkpoint
from forge.errors import CheckpointError
from forge.model.checkpoint_files import open_base
from forge.train.model_shape import DTYPE_NAMES
from forge.train.state import bytes_of

_BATCH_BYTES = 256 * 2**20
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""torch's types by safetensors' names."""


class CheckpointWeights:
    """Reads the value of any parameter or buffer of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, *, ema: bool = False, needs_base: bool = True) -> None:
        """Args:
        ema: read the averaged (EMA) weights of trained parameters.
        needs_base: whether weights that the checkpoint only refers to will be read.

        Raises: CheckpointError if the checkpoint has no EMA weights, or its base weights are missing or changed.
        """
        if ema and "ema" not in checkpoint.kinds:
            raise CheckpointError(f"{checkpoint.url} holds no ema weights: the job has no training.ema")
        self._checkpoint, self._ema = checkpoint, ema
        base = checkpoint.shape.values_base if needs_base else None
        self._base = None if base is None else open_base(checkpoint.shape, owner=checkpoint.url)

    def interval(self, name: str) -> Interval:
        """The interval of a whole parameter or buffer."""
        return self._checkpoint.value_interval(name, ema=self._ema)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter and buffer in its stored type, reading a few hundred MiB at a time.

        Raises: CheckpointError if they cannot be read.
        """
        batch: dict[str, tuple[Interval, Tensor]] = {}
        size = 0
        names = list(self._checkpoint.shape.parameters)
        for name in names:
            interval = self.interval(name)
            shape = self._checkpoint.shape.parameters[name].shape
            batch[name] = interval, torch.empty(shape, dtype=DTYPES[interval.dtype])
            size += interval.size_bytes
            if size >= _BATCH_BYTES or name == names[-1]:
                self._read([(interval, tensor.view(-1)) for interval, tensor in batch.values()])
                yield from ((name, tensor) for name, (_, tensor) in batch.items())
                batch, size = {}, 0

    def pieces(self, name: str, *, max_numel: int) -> Iterator[Tensor]:
        """Yield the elements of a parameter or buffer in order, as flat tensors of at most `max_numel` elements.

        Raises: CheckpointError if they cannot be read.
        """
        whole = self.interval(name)
        for start in range(0, whole.stop, max_numel):
            stop = min(start + max_numel, whole.stop)
            piece = torch.empty(stop - start, dtype=DTYPES[whole.dtype])
            part = Interval(kind=whole.kind, name=whole.name, start=start, stop=stop, dtype=whole.dtype)
            self._read([(part, piece)])
            yield piece

    def _read(self, wanted: Sequence[tuple[Interval, Tensor]]) -> None:
        self._checkpoint.read((interval, bytes_of(flat)) for interval, flat in wanted if interval.kind != "base")
        for interval, flat in wanted:
            if interval.kind == "base":
                assert self._base is not None, "a checkpoint with this kind refers to base weights"
                try:
                    self._base.read_into(interval.name, flat, start=interval.start)
                except (OSError, EOFError) as error:
                    raise CheckpointError(f"base weights cannot be read: {error}") from error
