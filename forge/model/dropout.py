"""Dropout whose masks do not depend on the number of workers.

Torch draws dropout masks from one random stream per process, so they change with the number of workers and cannot
be repeated when a run is resumed. Here the mask of a sample depends only on the seed, the step, the sample's
position in the global order, and the location in the model.

`torch.nn.functional.dropout`, which modules and models both call, is replaced in this process. The replacement also
applies to the recomputation of activation checkpointing, which may run in one of autograd's threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from forge.errors import ModelError
from forge.model.composite import encoder_of

_DRAWN_PER_BATCH = ("layerdrop", "jitter")
"""In the names of rates at which models of transformers skip layers or disturb the inputs of routers, by random
numbers that are drawn for a whole batch or in its order."""


def require_randomness_by_sample(config: PretrainedConfig) -> None:
    """Raises: ModelError if training would draw random numbers that depend on how a batch is divided."""
    for path, value in _numbers(config.to_dict()):
        if value > 0 and any(word in path for word in _DRAWN_PER_BATCH):
            key, _, rest = path.partition(".")
            drawn = "skips whole layers at random" if "layerdrop" in path else "multiplies inputs by random numbers"
            raise ModelError(
                f"{f'{rest}: ' if rest else ''}{value:g} {drawn}, drawn for a micro-batch and not for each of "
                "its samples, so losses would depend on the number of workers: set it to 0",
                key=key,
            )


def _numbers(body: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in body.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, prefix=f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def has_dropout(config: PretrainedConfig) -> bool:
    """Whether any of a config's dropout rates is above zero."""
    return any(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        for part in (config.get_text_config(), encoder_of(config))
        for key, value in part.to_dict().items()
        if "drop" in key
    )


def model_has_dropout(model: nn.Module) -> bool:
    """Whether a model uses dropout, according to its transformers config or to a `Dropout` module in it."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig) and has_dropout(config):
        return True
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


_AXIS_STEPS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)
"""Distances of the places of elements that are neighbours on an axis. Source: the primes of xxHash32."""


class SampleDropout:
    """A replacement for torch's dropout; `begin` sets the samples of each micro-batch."""

    def __init__(self, model: nn.Module, *, seed: int, part: tuple[int, int] | None = None) -> None:
        """Register hooks on every module, to know which one calls dropout.

        Args:
            part: where ranks share sequences, the part that this rank has, and their number; what is drawn for the
                whole sequence is applied to it.
        """
        self._seed = seed
        self._step = 0
        self._samples: list[str] = []
        self._part = part
        self._is_padded = False
        """Whether samples are padded to the longest of their micro-batch."""
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
            sequence_rows: the row of each sequence, in ascending order, if the model is given examples of rows,
                padded to the longest.

        Shapes: positions: int64[m], positions of its rows in the global order; -1 for padding rows.
            sequence_rows: int64[n].
        """
        self._step = step
        self._samples = [str(position) for position in positions.tolist()]
        self._is_padded = sequence_rows is not None
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
        seeds = [_stream(self._seed, self._step, sample, location) for sample in self._samples]
        if self._is_padded and not _is_prefix_stable(input, rows=rows):
            scale = 1 / (1 - p) if p < 1 else 0.0
            scaled = (
                padding_free_mask(input.shape, seeds=seeds, p=p, device=input.device).to(input.dtype).mul_(scale)
            )
            return input.mul_(scaled) if inplace else input * scaled
        mask = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        generator = torch.Generator(device=input.device)
        for index, seed in enumerate(seeds):
            generator.manual_seed(seed)
            own = mask[index * rows : (index + 1) * rows]
            if self._part is None:
                own.bernoulli_(1 - p, generator=generator)
            else:
                part, num_parts = self._part
                length = own.shape[1]
                whole = own.new_empty(rows, num_parts * length, *own.shape[2:])
                whole.bernoulli_(1 - p, generator=generator)
                own.copy_(whole[:, part * length : (part + 1) * length])
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


def padding_free_mask(shape: Sequence[int], *, seeds: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Draw what dropout keeps, such that an element depends on the seed of its sample and its indices alone.

    So a longer padding adds elements and changes none, also where it is within the tensor, as in attention weights.
    A stream of random numbers would go on elsewhere. The hash is the 32-bit finaliser of MurmurHash3, once over the
    indices, which all samples share, and once with the seed.

    Args:
        shape: of the input, [n·k, ...] with the k rows of each of the n samples adjacent.

    Returns: bool of this shape.
    """
    own = (shape[0] // len(seeds), *shape[1:])
    places = torch.zeros(own, dtype=torch.int32, device=device)
    for axis, size in enumerate(own):
        steps = torch.arange(size, dtype=torch.int64, device=device) * _AXIS_STEPS[axis % len(_AXIS_STEPS)]
        places += _as_int32(steps).view(-1, *[1] * (len(own) - axis - 1))
    starts = torch.tensor([seed & 0xFFFFFFFF for seed in seeds], dtype=torch.int64, device=device)
    mixed = _mix(_mix(places) ^ _as_int32(starts).view(-1, *[1] * len(own)))
    threshold = min(round(p * 2**31), 2**31 - 1)
    return ((mixed & 0x7FFFFFFF) >= threshold).view(*shape)


def _is_prefix_stable(input: Tensor, *, rows: int) -> bool:
    """Whether padding only adds elements after those of a sample, [n, length, ...], drawn in order."""
    return input.device.type == "cpu" and rows == 1 and input.ndim <= 3


def _mix(values: Tensor) -> Tensor:
    """The finaliser of MurmurHash3; int32, in place. Source: A. Appleby, MurmurHash3, `fmix32`."""
    values ^= (values >> 16) & 0xFFFF
    values *= -2048144789  # 0x85ebca6b
    values ^= (values >> 13) & 0x7FFFF
    values *= -1028477387  # 0xc2b2ae35
    values ^= (values >> 16) & 0xFFFF
    return values


def _as_int32(values: Tensor) -> Tensor:
    """The lowest 32 bits of int64, as int32."""
    return (((values + 2**31) & 0xFFFFFFFF) - 2**31).to(torch.int32)


def _stream(seed: int, step: int, sample: str, location: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{sample}/{location}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
