"""Dropout that belongs to the sample, not to the rank.

Torch draws dropout masks from a stream per process, so they change with the number of workers and are
lost when a run is resumed. Here the mask of a sample depends on the seed, the step, the sample's position
in the global order, and the place in the model, and on nothing else.

`torch.nn.functional.dropout`, which modules and models call alike, is replaced for this process. That
also reaches the recomputation of activation checkpointing, which may run in a thread of autograd's.
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
    """Whether a model drops anything: by its transformers config, or by a `Dropout` module in it."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig) and has_dropout(config):
        return True
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


class SampleDropout:
    """A replacement for torch's dropout, told before each micro-batch which samples it holds."""

    def __init__(self, model: nn.Module, *, seed: int) -> None:
        """Follow the model's calls, to know where in it a dropout happens."""
        self._seed = seed
        self._step = 0
        self._positions: list[int] = []
        self._calls: list[tuple[str, list[int]]] = []
        self._plain = torch.nn.functional.dropout
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name))
            module.register_forward_hook(self._leaving, always_call=True)

    def install(self) -> None:
        """Take the place of `torch.nn.functional.dropout` in this process."""
        torch.nn.functional.dropout = self.dropout

    def uninstall(self) -> None:
        """Put torch's own back."""
        torch.nn.functional.dropout = self._plain

    def begin(self, *, step: int, positions: NDArray[np.int64]) -> None:
        """The micro-batch that comes next.

        Shapes: positions: int64[m], of its rows in the global order; -1 for rows that only fill up.
        """
        self._step = step
        self._positions = positions.tolist()

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """As `torch.nn.functional.dropout`, each sample with a mask of its own.

        Shapes: input: [m·k, ...], the rows of a sample next to each other.
        """
        if not training or p <= 0 or not self._positions or input.shape[0] % len(self._positions):
            return self._plain(input, p, training, inplace)
        place = self._place()
        rows = input.shape[0] // len(self._positions)
        mask = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        generator = torch.Generator(device=input.device)
        for index, position in enumerate(self._positions):
            generator.manual_seed(_stream(self._seed, self._step, position, place))
            mask[index * rows : (index + 1) * rows].bernoulli_(1 - p, generator=generator)
        scaled = mask.div_(1 - p) if p < 1 else mask
        return input.mul_(scaled) if inplace else input * scaled

    def _place(self) -> str:
        """The innermost module that is being called, and how many dropouts it has done in this call."""
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


def _stream(seed: int, step: int, position: int, place: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{position}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
