"""The weights of a checkpoint, in place of the safetensors files of a `from_pretrained` folder.

A tensor is read by range, from a folder or an object store, whatever world size and ZeRO stage wrote it. Trained
weights are the fp32 masters. Weights that the checkpoint only refers to are read from their own folder. Adapters
are added to their weights, one whole tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from forge.checkpoint.adapter_config import AdapterConfig, adapter_config_from_record
from forge.checkpoint.intervals import Interval
from forge.checkpoint.manifest import BaseWeights, ModelShape, base_difference
from forge.checkpoint.reader import Checkpoint
from forge.checkpoint.source import open_source, source_digest
from forge.config.checkpoint_path import is_checkpoint
from forge.errors import CheckpointError, ModelError, PlanError
from forge.fs import default_cache_dir
from forge.model.adapter_names import is_adapter, unwrapped_name
from forge.model.adapter_weights import merged
from forge.model.adapters import AdapterLayer, adapter_layers, add_adapters
from forge.model.auto_classes import auto_class_of_config, build_on_meta
from forge.model.peft_weights import open_peft_folder
from forge.model.pretrained import PretrainedWeights, some
from forge.model.transformers_config import config_from_record
from forge.model.weight_files import DTYPES, TensorReader, WeightFiles, content_digests, open_weight_files

_PIECE_NUMEL = 4 * 2**20
_MAX_DEPTH = 16
"""Checkpoints that refer to others for weights that are not trained."""


class BaseReader(Protocol):
    """The weights that a checkpoint refers to, by the names of its parameters."""

    def __contains__(self, name: str) -> bool: ...

    def read_into(self, name: str, out: Tensor, *, start: int = 0) -> None:
        """Fill a flat tensor with elements from `start` on, converted to its type. Raises: OSError, EOFError."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _BaseTensor:
    """One parameter that a checkpoint refers to."""

    base: BaseReader
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, out: Tensor, *, start: int = 0) -> None:
        self.base.read_into(self.name, out, start=start)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MergedTensor:
    """One weight with its adapter added, in fp32."""

    layer: AdapterLayer
    tensors: Mapping[str, TensorReader]
    """Of the checkpoint, by name."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors[self.layer.weight].shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, out: Tensor, *, start: int = 0) -> None:
        whole = merged_weight(self.layer, read=self._read)
        out.copy_(whole.reshape(-1)[start : start + out.numel()])

    def _read(self, name: str) -> Tensor:
        reader = self.tensors[name]
        flat = torch.empty(reader.numel)
        reader.read_into(flat)
        return flat.view(reader.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FilesByName:
    """Base weights of a model that is none of transformers: the files have the names of its parameters."""

    files: WeightFiles

    def __contains__(self, name: str) -> bool:
        return name in self.files.tensors

    def read_into(self, name: str, out: Tensor, *, start: int = 0) -> None:
        self.files.tensors[name].read_into(out, start=start)


def open_weights(source: str) -> WeightFiles:
    """Open pretrained weights: a folder, a hub id, or a checkpoint by its path or URL, whose adapters are merged.

    Raises: PlanError if there are none, they are damaged, or a checkpoint refers to weights that have changed, or
        to itself.
    """
    return _open_weights(source, depth=0)


def open_trained(source: str) -> dict[str, TensorReader]:
    """Open what a checkpoint or an adapter folder holds of trained parameters, by name. Raises: PlanError."""
    if not is_checkpoint(source):
        return open_peft_folder(source)
    checkpoint = _open(source)
    return {
        name: _own_tensor(checkpoint, name)
        for name, parameter in checkpoint.shape.parameters.items()
        if parameter.kind == "master"
    }


def require_same_adapters(
    source: str, config: AdapterConfig, *, trained: Collection[str], files: WeightFiles
) -> None:
    """Check that the adapters of a checkpoint fit the model of a job.

    Args:
        trained: parameters that the job trains whole beside the adapters.
        files: the pretrained weights of the job.

    Raises: ModelError with the key that differs; PlanError.
    """
    shape = _open(source).shape
    found = adapter_config_from_record(shape.adapters)
    theirs, ours = ({*one.modules, *one.parameters} for one in (found, config))
    if theirs != ours:
        raise ModelError(_difference(source, theirs, ours, what="adapters on"), key="lora.targets")
    whole = {name for name, one in shape.parameters.items() if one.kind == "master" and not is_adapter(name)}
    if whole != set(trained):
        raise ModelError(_difference(source, whole, set(trained), what="trained whole"), key="lora.modules_to_save")
    assert shape.base is not None, "adapters are added to weights that the checkpoint refers to"
    try:
        require_base(shape.base, files, owner=source)
    except CheckpointError as error:
        raise ModelError(f"the adapters are of other weights: {error}", key="lora.init_from") from error


def _difference(source: str, theirs: set[str], ours: set[str], *, what: str) -> str:
    """Say which layers differ between a checkpoint's adapters and those of a job."""
    parts = [f"{what} {some(sorted(theirs - ours))}, which the job has not"] if theirs - ours else []
    parts += [f"nothing for {some(sorted(ours - theirs))}, which the job has"] if ours - theirs else []
    return f"{source} has {' and '.join(parts)}; leave this key out to take the run's"


def open_base(shape: ModelShape, *, owner: str, depth: int = 0) -> BaseReader:
    """Open the weights that a checkpoint refers to.

    Args:
        owner: the checkpoint, for messages.

    Raises: PlanError if they are missing, or lack a parameter; CheckpointError if their files have changed.
    """
    assert shape.values_base is not None, "the checkpoint has parameters of the kind `base`"
    files = _open_weights(shape.values_base.source, depth=depth)
    require_base(shape.values_base, files, owner=owner)
    if not shape.config:
        return _FilesByName(files=files)
    config = config_from_record(shape.config)
    return PretrainedWeights(
        files,
        build_on_meta(config, auto_class=auto_class_of_config(config)),
        is_required=lambda name: name in shape.parameters and shape.parameters[name].kind == "base",
    )


def require_base(base: BaseWeights, files: WeightFiles, *, owner: str) -> None:
    """Raises: CheckpointError unless files have the content that a checkpoint refers to."""
    try:
        digests = content_digests(files, cache=default_cache_dir() / "digests")
    except OSError as error:
        raise CheckpointError(f"weights that {owner} refers to cannot be read: {error}") from error
    difference = base_difference(base, BaseWeights(source=files.source, revision=files.revision, files=digests))
    if difference is not None:
        raise CheckpointError(f"{owner}: {difference}. Restore the file")


def layers_with_adapters(shape: ModelShape) -> list[AdapterLayer]:
    """The adapters of a checkpoint's model.

    Raises: ModelError if peft is missing, or has no such adapters, or they do not fit its tensors.
    """
    config = config_from_record(shape.config)
    model = build_on_meta(config, auto_class=auto_class_of_config(config))
    add_adapters(model, adapter_config_from_record(shape.adapters))
    for wrapped, value in model.named_parameters():
        name, wanted = unwrapped_name(wrapped), tuple(value.shape)
        found = shape.parameters.get(name)
        if found is None or found.shape != wanted:
            held = f"has {name} with the shape {list(found.shape)}" if found is not None else f"has no {name}"
            raise ModelError(f"the checkpoint {held}, and its config and adapters describe one of {list(wanted)}")
    return adapter_layers(model)


def merged_weight(layer: AdapterLayer, *, read: Callable[[str], Tensor]) -> Tensor:
    """Return a weight with its adapter added.

    Args:
        read: returns a whole parameter of the checkpoint in fp32, by name.
    """
    return merged(
        read(layer.weight),
        layer,
        factor_a=read(f"{layer.prefix}.lora_A.weight"),
        factor_b=read(f"{layer.prefix}.lora_B.weight"),
        magnitude=read(f"{layer.prefix}.lora_magnitude_vector.weight") if layer.use_dora else None,
    )


def _open_weights(source: str, *, depth: int) -> WeightFiles:
    return _open_checkpoint(source, depth=depth) if is_checkpoint(source) else open_weight_files(source)


def _open(source: str) -> Checkpoint:
    try:
        return open_source(source)
    except CheckpointError as error:
        raise PlanError(f"model.from_pretrained: {error}") from error


def _open_checkpoint(source: str, *, depth: int) -> WeightFiles:
    if depth > _MAX_DEPTH:
        problem = f"{source} refers to a checkpoint that refers to another, and so on, {_MAX_DEPTH} times"
        raise PlanError(f"model.from_pretrained: {problem}")
    checkpoint = _open(source)
    shape = checkpoint.shape
    try:
        digest = source_digest(source)
        tensors = _tensors(checkpoint, owner=source, depth=depth)
        layers = layers_with_adapters(shape) if shape.adapters else []
        _require_whole(layers, tensors)
    except CheckpointError as error:
        raise PlanError(f"model.from_pretrained: {error}") from error
    except ModelError as error:
        raise PlanError(f"model.from_pretrained: {source} holds adapters: {error.problem}") from error
    found = {name: tensor for name, tensor in tensors.items() if not (shape.adapters and is_adapter(name))}
    found |= {layer.weight: _MergedTensor(layer=layer, tensors=tensors) for layer in layers}
    digests = {"manifest.json": digest}
    return WeightFiles(
        source=source, revision=None, paths=(), tensors=found, digests=digests, num_merged=len(layers)
    )


def _tensors(checkpoint: Checkpoint, *, owner: str, depth: int) -> dict[str, TensorReader]:
    """Every tensor of a checkpoint, those that it only refers to included. Raises: PlanError, CheckpointError."""
    shape = checkpoint.shape
    base = None if shape.values_base is None else open_base(shape, owner=owner, depth=depth + 1)
    tensors: dict[str, TensorReader] = {}
    for name, parameter in shape.parameters.items():
        if parameter.kind != "base":
            tensors[name] = _own_tensor(checkpoint, name)
        elif base is not None and name in base:
            dtype = DTYPES[parameter.dtype]
            tensors[name] = _BaseTensor(base=base, name=name, dtype=dtype, shape=parameter.shape)
        else:
            raise CheckpointError(f"{owner} refers to {name} of weights that do not have it")
    return tensors


def _own_tensor(checkpoint: Checkpoint, name: str) -> CheckpointTensor:
    interval, shape = checkpoint.value_interval(name), checkpoint.shape.parameters[name].shape
    return CheckpointTensor(checkpoint=checkpoint, interval=interval, shape=shape)


def _require_whole(layers: list[AdapterLayer], tensors: Mapping[str, TensorReader]) -> None:
    """Raises: CheckpointError if a checkpoint lacks a tensor of its adapters."""
    for layer in layers:
        for name in (layer.weight, *(f"{layer.prefix}.{part}.weight" for part in layer.parts)):
            if name not in tensors:
                raise CheckpointError(f"the checkpoint has no {name}, which its adapters need")
