"""Dropout whose masks do not depend on the number of workers.

Torch draws dropout masks from one random stream per process, so they change with the number of workers and cannot
be repeated when a run is resumed. Here the mask of a sample depends only on the seed, the step, the sample's
position in the global order, and the location in the model.

`torch.nn.functional.dropout`, which modules and models both call, is replaced in this process. The replacement also
applies to the recomputation of activation checkpointing, which may run in one of autograd's threads.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig


def has_dropout(config: PretrainedConfig) -> bool:
    """Whether any of a config's dropout rates is above zero."""
    values = config.get_text_config().to_dict()
    return any(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        for key, value in values.items()
        if "drop" in key
    )


def model_has_dropout(model: nn.Module) -> bool:
    """Whether a model uses dropout, according to its transformers config or to a `Dropout` module in it."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig) and has_dropout(config):
        return True
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


class SampleDropout:
    """A replacement for torch's dropout; `begin` sets the samples of each micro-batch."""

    def __init__(self, model: nn.Module, *, seed: int) -> None:
        """Register hooks on every module, to know which one calls dropout."""
        self._seed = seed
        self._step = 0
        self._samples: list[str] = []
        self._calls: list[tuple[str, list[int]]] = []
        self._plain = torch.nn.functional.dropout
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name))
            module.register_forward_hook(self._leaving, always_call=True)

    def install(self) -> None:
        """Replace `torch.nn.functional.dropout` in this process."""
        torch.nn.functional.dropout = self.dropout

    def uninstall(self) -> None:
        """Restore torch's own dropout."""
        torch.nn.functional.dropout = self._plain

    def begin(
        self, *, step: int, positions: NDArray[np.int64], sequence_rows: NDArray[np.int64] | None = None
    ) -> None:
        """Set the micro-batch that is computed next.

        Args:
            sequence_rows: the row of each sequence, in ascending order, if the model is not given one per row.

        Shapes: positions: int64[m], positions of its rows in the global order; -1 for padding rows.
            sequence_rows: int64[n].
        """
        self._step = step
        self._samples = [str(position) for position in positions.tolist()]
        if sequence_rows is not None:
            first = np.searchsorted(sequence_rows, sequence_rows)
            numbers = np.arange(len(sequence_rows)) - first
            self._samples = [
                f"{self._samples[row]}.{number}" for row, number in zip(sequence_rows, numbers, strict=True)
            ]

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Apply dropout with a separate mask for each sample; arguments as of `torch.nn.functional.dropout`.

        Shapes: input: [m·k, ...], with the k rows of a sample adjacent.
        """
        if not training or p <= 0 or not self._samples or input.shape[0] % len(self._samples):
            return self._plain(input, p, training, inplace)
        location = self._next_location()
        rows = input.shape[0] // len(self._samples)
        mask = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        generator = torch.Generator(device=input.device)
        for index, sample in enumerate(self._samples):
            generator.manual_seed(_stream(self._seed, self._step, sample, location))
            mask[index * rows : (index + 1) * rows].bernoulli_(1 - p, generator=generator)
        scaled = mask.div_(1 - p) if p < 1 else mask
        return input.mul_(scaled) if inplace else input * scaled

    def _next_location(self) -> str:
        """Name the innermost module being called, and number its dropout calls."""
        if not self._calls:
            return ""
        name, done = self._calls[-1]
        done[0] += 1
        return f"{name}#{done[0]}"

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: Any) -> None:
            self._calls.append((name, [0]))

        return hook

    def _leaving(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._calls.pop()


def _stream(seed: int, step: int, sample: str, location: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{sample}/{location}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
