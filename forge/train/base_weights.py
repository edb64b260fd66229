"""Which pretrained weights a run begins with, and which its frozen parameters come from: digests that all nodes
agree on."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import nn

from forge.checkpoint.manifest import BaseWeights, ModelShape
from forge.errors import CheckpointError
from forge.fs import default_cache_dir, digest_file
from forge.model.adapter_names import has_adapters
from forge.model.adapter_weights import AdaptedWeights
from forge.model.adapters import adapter_layers
from forge.model.checkpoint_files import open_trained
from forge.model.pretrained import PretrainedWeights
from forge.model.weight_files import DTYPES, WeightFiles


def initial_weights(
    base: PretrainedWeights, model: nn.Module, shape: ModelShape, *, seed: int, adapters_from: str | None = None
) -> PretrainedWeights | AdaptedWeights:
    """The values that training begins with: the pretrained weights and, if the model has any, the adapters.

    Args:
        adapters_from: the checkpoint of another run with these adapters; None: new ones.
    """
    if not has_adapters(model):
        return base
    types = {name: DTYPES[parameter.dtype] for name, parameter in shape.parameters.items()}
    shapes = {name: parameter.shape for name, parameter in shape.parameters.items()}
    earlier = open_trained(adapters_from) if adapters_from is not None else {}
    return AdaptedWeights(base, adapter_layers(model), shapes=shapes, types=types, seed=seed, earlier=earlier)


def digest_base(files: WeightFiles) -> BaseWeights:
    """Name the content of the weight files; collective. The ranks of a node divide its files among them.

    A file whose size and modification time are as they were is not read again on the same node.

    Raises: CheckpointError on every rank if a file cannot be read, or is not the same on all nodes.
    """
    first, step = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    own = dict(files.digests or {})
    failure = None
    try:
        for path in files.paths[first::step]:
            own[path.name] = digest_file(path, cache=default_cache_dir() / "digests")
    except OSError as error:
        failure = f"{error.filename} cannot be read: {error.strerror}"
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (own, failure))
    found: dict[str, str] = {}
    for digests, problem in every:
        if problem is not None:
            raise CheckpointError(problem)
        for name, digest in digests.items():
            if found.setdefault(name, digest) != digest:
                raise CheckpointError(
                    f"{name} of {files.source} is not the same on all nodes: digests {found[name]} and {digest}"
                )
    return BaseWeights(source=files.source, revision=files.revision, files=dict(sorted(found.items())))
