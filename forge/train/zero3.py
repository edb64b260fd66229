"""Dividing a model among ranks under ZeRO 3, and DeepSpeed's groups of hpZ.

In a group of hpZ the ranks share a second copy of the weights. DeepSpeed keeps the group of a process in a module
variable, creates it whenever it divides a model, and fails if it exists; forge divides a model in several calls,
and tests build several engines in a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
from deepspeed.runtime.zero import partition_parameters
from deepspeed.utils import groups
from torch import nn

from forge.model.adapters import modules_reading_weights
from forge.model.families.base import Sharding
from forge.train.shard_groups import ShardGroups


def sharding_of(deepspeed_config: Mapping[str, Any], *, shard_groups: ShardGroups | None = None) -> Sharding:
    """Return how a model is divided as soon as it is built; collective.

    Args:
        shard_groups: the groups that each divide the whole model, if there are several.
    """
    init = partial(
        deepspeed.zero.Init,
        data_parallel_group=None if shard_groups is None else shard_groups.group,
        config_dict_or_path=deepspeed_config,
        mpu=shard_groups,
        zero_param_parallel_group=use_hpz_group(deepspeed_config),
    )
    return Sharding(
        construct=partial(_partition_when_built, init),
        gather=_gather,
        partition=lambda module: init(module=module) and None,
    )


def use_hpz_group(deepspeed_config: Mapping[str, Any]) -> Any:
    """Create this rank's group for the engine that is built next; collective.

    Args:
        deepspeed_config: DeepSpeed's configuration; the group has `zero_hpz_partition_size` consecutive ranks.

    Returns: the group of torch.distributed; None without hpZ.
    """
    size = deepspeed_config["zero_optimization"].get("zero_hpz_partition_size", 1)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if size > 1:
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()


def drop_second_copies(parameters: Iterable[nn.Parameter]) -> None:
    """Drop this rank's shares of second copies, since the weights have changed; the next forward pass makes them
    again."""
    for parameter in parameters:
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


def gather_whole_modules(model: nn.Module) -> None:
    """Have ZeRO 3 gather the weights of modules that read them otherwise than through their own layers."""
    whole = modules_reading_weights(model)
    for module in whole:
        deepspeed.utils.set_z3_leaf_module(module, True)
    if whole:  # DeepSpeed frees their weights before their backward pass if their inputs need no gradient
        model.enable_input_require_grads()  # type: ignore[operator]


@contextmanager
def _partition_when_built(init: Callable[[], Any]) -> Iterator[None]:
    """Partition modules as they are built; rotary frequencies are still computed in fp32.

    Within `zero.Init` torch's constructors give tensors of the model's precision, also where a model asks for fp32,
    as it does for the numbers of positions and dimensions that frequencies are computed from. transformers 5.23 has
    a context manager for this; older versions do not.
    """
    wrap = partition_parameters.zero_wrapper_for_fp_tensor_constructor

    def wrap_other_constructors(function: Any, *, target_fp_dtype: Any, target_device: Any) -> Any:
        kept = None if function is partition_parameters._orig_torch_arange else target_fp_dtype
        return wrap(function, target_fp_dtype=kept, target_device=target_device)

    partition_parameters.zero_wrapper_for_fp_tensor_constructor = wrap_other_constructors
    try:
        with init():
            yield
    finally:
        partition_parameters.zero_wrapper_for_fp_tensor_constructor = wrap


def _gather(parameters: list[nn.Parameter]) -> Any:
    """Gather whole parameters; changes by rank 0 are broadcast on exit."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
