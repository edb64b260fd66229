"""Activation checkpointing that keeps the results of matrix products and of fused attention
(`training.activation_checkpointing: selective`).

The backward pass of a layer runs its forward pass again, but takes these results from memory: what is computed
twice are the cheap operations, such as norms and activation functions, whose inputs and results take most of the
memory of a layer. The scores of attention that is not fused are computed again.

Source: Korthikanti et al., arXiv 2205.05198, section 5; torch's `create_selective_checkpoint_contexts`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from forge.errors import ModelError

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm"})
"""Products with weights, which torch's linear layers call; batched products (`bmm`) are the scores of attention."""
_ATTENTIONS = frozenset(
    {f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn", "fused")}
    | {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    }
    | {"flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"}
    | {"flash_attn_3::_flash_attn_forward"}
)
"""torch's fused kernels, and those of the packages flash-attn and flash-attn-3."""


def enable_checkpointing(model: nn.Module, *, is_selective: bool, offloads: bool = False) -> None:
    """Recompute the activations of each layer in the backward pass.

    Args:
        offloads: hold the inputs of layers in host memory until then.

    Raises: ModelError if the model has no activation checkpointing, or cannot offload.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if is_selective:
        options["context_fn"] = selective_contexts
    if (problem := checkpointing_problem(model)) is not None:
        raise ModelError(problem, key="class")
    is_new = hasattr(model, "activation_checkpointing_enable")
    # A class of the user, or transformers before 5.23, have only the older name.
    enable: Any = model.activation_checkpointing_enable if is_new else model.gradient_checkpointing_enable
    if offloads and "offload" not in inspect.signature(enable).parameters:
        raise ModelError(
            f"{type(model).__name__} of this version of transformers cannot offload activations "
            "(training.activation_offload): install transformers 5.23, or set it to false"
        )
    name = "activation_checkpointing_kwargs" if is_new else "gradient_checkpointing_kwargs"
    enable(**{name: options}, **({"offload": True} if offloads else {}))


def checkpointing_problem(model: nn.Module) -> str | None:
    """Return why the activations of a model cannot be recomputed; None if they can."""
    name = type(model).__name__
    if not hasattr(model, "gradient_checkpointing_enable"):
        return f"{name} has no gradient_checkpointing_enable()"
    if not getattr(model, "supports_gradient_checkpointing", True):
        return f"{name} of transformers does not support it (supports_gradient_checkpointing)"
    return None


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a layer's forward pass and of its recomputation, for torch's `checkpoint`."""
    keep, replay = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return keep, _Replay(replay)


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(operation: Any) -> bool:
    return operation.name() in PRODUCTS or operation.name() in _ATTENTIONS


class _Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's context of a recomputation, without its check of all other operations.

    torch refuses a recomputation that has more operations of a kind than the forward pass. Under ZeRO 3 it may have
    more: a module whose weights were gathered ahead of the forward pass gathers them when it is called again.
    """

    def __init__(self, replay: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._replay = replay

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _is_kept(operation):
            return self._replay.__torch_dispatch__(operation, types, args, kwargs)
        return operation(*args, **(kwargs or {}))
