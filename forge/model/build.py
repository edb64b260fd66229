"""A transformers causal language model, from the job's `model:` section and a seed.

The weights depend on the seed and on the name of the module alone: each module is initialised from a
stream of its own. So they are the same at every world size and ZeRO stage, also where DeepSpeed
divides each module as soon as it is built and no rank ever holds the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions, no_init_weights

from forge.config.model import ModelSpec
from forge.errors import PlanError

GatherParameters = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Makes divided parameters whole while the context lasts (ZeRO 3)."""


def build_config(spec: ModelSpec, *, vocab_size: int, seq_len: int, eot_id: int | None) -> PretrainedConfig:
    """The transformers config of a job: its own keys, with vocabulary and positions taken from the data.

    Raises: PlanError if transformers refuses the architecture or a value.
    """
    if spec.from_pretrained is not None:
        try:
            return AutoConfig.from_pretrained(spec.from_pretrained, **spec.config_overrides)
        except (OSError, ValueError) as error:
            raise PlanError(f"model.from_pretrained: {_one_line(error)}") from error
    given = spec.config_overrides
    try:
        base = AutoConfig.for_model(spec.architecture)
        names = {base.attribute_map.get(key, key) for key in given}
        derived: dict[str, Any] = {"vocab_size": vocab_size, "max_position_embeddings": seq_len}
        derived |= {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": None}
        derived = {
            key: value
            for key, value in derived.items()
            if hasattr(base, key) and base.attribute_map.get(key, key) not in names
        }
        return AutoConfig.for_model(spec.architecture, **(derived | given))
    except Exception as error:  # transformers validates with exceptions of several unrelated classes
        raise PlanError(f"model.architecture {spec.architecture}: {_one_line(error)}") from error


def build_model(
    spec: ModelSpec,
    config: PretrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    construct: AbstractContextManager[Any] | None = None,
    gather: GatherParameters | None = None,
    skip_init: bool = False,
) -> PreTrainedModel:
    """Build the network with its first weights.

    Args:
        dtype: of all parameters; buffers such as rotary frequencies stay in fp32.
        construct: a context under which modules are created (DeepSpeed's `zero.Init` for ZeRO 3).
        gather: makes divided parameters whole, rank 0's writes being sent to all (ZeRO 3).
        skip_init: leave the weights without values, since every one of them is going to be overwritten.

    Raises: PlanError if the folder of `from_pretrained` does not hold a causal language model.
    """
    if spec.from_pretrained is not None and not skip_init:
        return _load_pretrained(spec.from_pretrained, config, dtype=dtype)
    with no_init_weights(), construct or nullcontext():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not skip_init:
        initialise(model, seed=seed, gather=gather)
    model.tie_weights()
    return model


@torch.no_grad()
def initialise(model: PreTrainedModel, *, seed: int, gather: GatherParameters | None = None) -> None:
    """Draw every module's weights from the stream of (seed, module name), by the model's own rules.

    Children come before their parents, as in transformers, since a parent may redraw some of its
    children's weights (GPT-2 scales its residual projections so).
    """
    generator_state = torch.get_rng_state()
    whole = gather or (lambda parameters: nullcontext())
    with guard_torch_init_functions():
        for name, module, owner in _children_first(model, "", model):
            # A model class may touch any parameter below it, a layer only its own and its children's.
            recurse = isinstance(module, PreTrainedModel) and gather is not None
            parameters = list(_parameters_within_reach(module, everything=recurse))
            if not parameters and not list(module.buffers(recurse=False)):
                continue
            torch.manual_seed(_stream(seed, name))
            with whole(parameters):
                owner._initialize_weights(module)
    torch.set_rng_state(generator_state)


def _children_first(
    module: nn.Module, name: str, owner: PreTrainedModel
) -> Iterable[tuple[str, nn.Module, PreTrainedModel]]:
    """Modules in post-order, each with the innermost model whose rules apply to it."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        yield from _children_first(child, path, child if isinstance(child, PreTrainedModel) else owner)
    yield name, module, owner


def _parameters_within_reach(module: nn.Module, *, everything: bool) -> Iterable[nn.Parameter]:
    if everything:
        yield from module.parameters()
        return
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, PreTrainedModel):
            yield from child.parameters(recurse=False)


def _stream(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _load_pretrained(folder: str, config: PretrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    if Path(folder).exists() and not (Path(folder) / "config.json").is_file():
        raise PlanError(f"model.from_pretrained: {folder} holds no config.json")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise PlanError(f"model.from_pretrained: {_one_line(error)}") from error
    return model


def _one_line(error: BaseException) -> str:
    """An exception's text on one line, of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
