"""The weights of a checkpoint, in place of the safetensors files of a `from_pretrained` folder.

A tensor is read by range, from a folder or an object store, whatever world size and ZeRO stage wrote it. Trained
weights are the fp32 masters. Weights that the checkpoint only refers to are read from their own folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forge.checkpoint.intervals import Interval
from forge.checkpoint.manifest import BaseWeights, base_difference
from forge.checkpoint.reader import Checkpoint
from forge.checkpoint.source import open_source, source_digest
from forge.config.checkpoint_path import is_checkpoint
from forge.errors import CheckpointError, PlanError
from forge.fs import default_cache_dir
from forge.model.weight_files import DTYPES, TensorReader, WeightFiles, content_digests, open_weight_files

_PIECE_NUMEL = 4 * 2**20
_MAX_DEPTH = 16
"""Checkpoints that refer to others for weights that are not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTensor:
    """One parameter or buffer of a checkpoint."""

    checkpoint: Checkpoint
    interval: Interval
    """Of the whole tensor."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.interval.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, out: Tensor, *, start: int = 0) -> None:
        """Fill a flat tensor with the elements from `start` on, converted to its type; a few MiB at a time.

        Raises: CheckpointError if they cannot be read.
        """
        whole = self.interval
        for first in range(0, out.numel(), _PIECE_NUMEL):
            target = out[first : first + _PIECE_NUMEL]
            piece = torch.empty(target.numel(), dtype=self.dtype)
            at = start + first
            part = Interval(kind=whole.kind, name=whole.name, start=at, stop=at + target.numel(), dtype=whole.dtype)
            view = memoryview(piece.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
            self.checkpoint.read([(part, view)])
            target.copy_(piece)


def open_weights(source: str) -> WeightFiles:
    """Open pretrained weights: a folder, a hub id, or a checkpoint by its path or URL.

    Raises: PlanError if there are none, they are damaged, or a checkpoint holds adapters or refers to weights that
        have changed, or to itself.
    """
    return _open_weights(source, depth=0)


def _open_weights(source: str, *, depth: int) -> WeightFiles:
    return _open_checkpoint(source, depth=depth) if is_checkpoint(source) else open_weight_files(source)


def _open_checkpoint(source: str, *, depth: int) -> WeightFiles:
    if depth > _MAX_DEPTH:
        problem = f"{source} refers to a checkpoint that refers to another, and so on, {_MAX_DEPTH} times"
        raise PlanError(f"model.from_pretrained: {problem}")
    try:
        checkpoint = open_source(source)
        digest = source_digest(source)
    except CheckpointError as error:
        raise PlanError(f"model.from_pretrained: {error}") from error
    shape = checkpoint.shape
    if shape.adapters:
        raise PlanError(
            f"model.from_pretrained: {source} holds adapters, not the weights of a model: export them merged "
            "(forge checkpoints export RUN --to FOLDER) and give that folder"
        )
    base = None if shape.values_base is None else _open_base(source, shape.values_base, depth=depth + 1)
    tensors: dict[str, TensorReader] = {}
    for name, parameter in shape.parameters.items():
        if parameter.kind != "base":
            interval = checkpoint.value_interval(name)
            tensors[name] = CheckpointTensor(checkpoint=checkpoint, interval=interval, shape=parameter.shape)
        elif base is not None and name in base.tensors:
            tensors[name] = base.tensors[name]
        else:
            raise PlanError(
                f"model.from_pretrained: {source} refers to {name} of other weights, whose files have other names "
                "for it: export the run (forge checkpoints export) and give that folder"
            )
    return WeightFiles(source=source, revision=None, paths=(), tensors=tensors, digests={"manifest.json": digest})


def _open_base(source: str, base: BaseWeights, *, depth: int) -> WeightFiles:
    """Open the weights that a checkpoint refers to. Raises: PlanError if they are missing or have changed."""
    files = _open_weights(base.source, depth=depth)
    try:
        digests = content_digests(files, cache=default_cache_dir() / "digests")
    except OSError as error:
        problem = f"weights that {source} refers to cannot be read: {error}"
        raise PlanError(f"model.from_pretrained: {problem}") from error
    difference = base_difference(base, BaseWeights(source=base.source, revision=files.revision, files=digests))
    if difference is not None:
        raise PlanError(f"model.from_pretrained: {source}: {difference}")
    return files
