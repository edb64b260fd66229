"""What a transformers model keeps of a forward pass for the backward pass, measured on the meta device: all of it,
and the results of matrix products, which selective activation checkpointing keeps.

Formulas from sizes alone (`forge.plan.memory.activation_bytes`) miss what a family's own code keeps: norms that
compute in fp32, activation functions made of several operations, the masks of dropout. Here torch itself is asked,
with `torch.autograd.graph.saved_tensors_hooks`; nothing is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from forge.model.selective_checkpoint import PRODUCTS

ATTENTION = "forge-meta"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused attention keeps: its inputs, its output, and one sum in fp32 per row of scores.

    Source: FlashAttention (arXiv 2205.14135), algorithm 1; `aten::_scaled_dot_product_flash_attention`.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_rows, num_heads, num_tokens, _ = query.shape
        output = query.new_empty(num_rows, num_tokens, num_heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("the meta device computes no gradients")


def _attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> tuple[Tensor, None]:
    output: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)  # and no mask: transformers then makes none


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBytes:
    """Bytes of one row of tokens, by `training.precision`."""

    layers: dict[str, int]
    """What the base model keeps with fused attention."""
    products: dict[str, int]
    """The results of its matrix products, whether they are kept or not."""
    changes_products: bool
    """Whether any of these results is changed in place later."""


def kept_bytes_per_row(model: Any, *, seq_len: int) -> KeptBytes:
    """Measure what the base model keeps of one row for the backward pass.

    Args:
        model: of transformers, on the meta device; its precision and its attention are as before afterwards.
        seq_len: tokens of the row.

    Returns: empty sizes if the model cannot be run on the meta device, such as one that reads values of a router.
    """
    before, dtype, was_training = model.config._attn_implementation, model.dtype, model.training
    try:
        model.set_attn_implementation(ATTENTION)
        model.train()
        found = {name: _kept_bytes(model.to(of_probe), seq_len=seq_len) for name, of_probe in _DTYPES.items()}
        return KeptBytes(
            layers={name: size for name, (size, _) in found.items()},
            products={name: products.num_bytes for name, (_, products) in found.items()},
            changes_products=any(products.are_changed for _, products in found.values()),
        )
    except Exception:  # any code of transformers may fail without values
        return KeptBytes(layers={}, products={}, changes_products=False)
    finally:
        model.set_attn_implementation(before)
        model.to(dtype).train(was_training)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.name() in PRODUCTS:
            self._results.append((result, result._version))
        return result

    @property
    def num_bytes(self) -> int:
        return sum(result.untyped_storage().nbytes() for result, _ in self._results)

    @property
    def are_changed(self) -> bool:
        return any(result._version != version for result, version in self._results)


def _kept_bytes(model: Any, *, seq_len: int) -> tuple[int, _Products]:
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no other storage gets its address
        return tensor

    tokens = torch.zeros(1, seq_len, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _Products() as products:
        model.base_model(input_ids=tokens, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), products
