"""Initialise weights from a seed, equally at every world size and ZeRO stage.

Each module draws from its own random stream, seeded by (seed, module name). Its weights therefore depend neither on
earlier draws nor on whether ZeRO 3 has already partitioned other modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

GatherParameters = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Gathers partitioned parameters for the duration of a context (ZeRO 3)."""


@torch.no_grad()
def initialise(
    model: PreTrainedModel,
    *,
    seed: int,
    gather: GatherParameters | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Draw every module's weights from the stream of (seed, module name), by the model's own rules.

    Children are initialised before their parents, as in transformers, because a parent may overwrite weights of its
    children (as GPT-2 does to scale its residual projections).

    Args:
        only: names of parameters; modules that neither have one of them nor have a child that does are left out.
    """
    wanted = None if only is None else {id(p) for name, p in model.named_parameters() if name in only}
    generator_state = torch.get_rng_state()
    whole = gather or (lambda parameters: nullcontext())
    with guard_torch_init_functions():
        for name, module, owner in _children_first(model, "", model):
            # A model class may touch any parameter below it, a layer only its own and its children's.
            recurse = isinstance(module, PreTrainedModel) and gather is not None
            parameters = list(_parameters_within_reach(module, everything=recurse))
            if not parameters and not list(module.buffers(recurse=False)):
                continue
            if wanted is not None:
                own = list(_parameters_within_reach(module, everything=False))
                if not any(id(parameter) in wanted for parameter in own):
                    continue
                parameters = own
            torch.manual_seed(stream(seed, name))
            with whole(parameters):
                owner._initialize_weights(module)
    torch.set_rng_state(generator_state)


def stream(seed: int, name: str) -> int:
    """The seed of one module's random stream."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _children_first(
    module: nn.Module, name: str, owner: PreTrainedModel
) -> Iterable[tuple[str, nn.Module, PreTrainedModel]]:
    """Yield modules in post-order, each with the innermost model whose initialisation rules apply to it."""
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
