"""Bytes of the training state that a rank holds, counted in the storages of all live tensors."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def held_bytes(engine: Any) -> dict[str, int]:
    """Count the tensors of this process by purpose, between two micro-batches, when activations are gone.

    Args:
        engine: a `forge.train.engine.Engine` that has taken a step.

    Returns: bytes of `weights`, `optimizer` (with the fp32 weights), `ema`, `bucket` of gradients that are reduced,
        and `gradients`: everything else.
    """
    parameters = list(engine.model.parameters())
    optimizer = engine.state._torch_optimizer
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
    buckets = getattr(engine._engine.optimizer, "ipg_buckets", {}).values()
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    second = [getattr(parameter, "ds_secondary_tensor", None) for parameter in parameters]
    kinds: dict[str, Iterable[Any]] = {
        "weights": [*weights, *second],
        "optimizer": [*engine.state._owners, *owners, *state],
        "ema": engine.state._averages.values(),
        "bucket": [one for of in buckets for one in (of.buffer if isinstance(of.buffer, list) else [of.buffer])],
        "gradients": [*_live_tensors(), *(parameter.grad for parameter in parameters)],
    }
    seen: set[int] = set()
    held = {}
    for kind, tensors in kinds.items():
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if isinstance(tensor, Tensor)}
        held[kind] = sum(storages[at].untyped_storage().nbytes() for at in storages.keys() - seen)
        seen |= storages.keys()
    return held


def _live_tensors() -> list[Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's deprecated objects, which isinstance asks
        return [value for value in gc.get_objects() if isinstance(value, Tensor)]
