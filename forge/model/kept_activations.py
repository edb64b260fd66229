"""What a transformers model keeps of a forward pass for the backward pass, measured on the meta device.

Formulas from sizes alone (`forge.plan.memory.activation_bytes`) miss what a family's own code keeps: norms that
compute in fp32, activation functions made of several operations, the masks of dropout. Here torch itself is asked,
with `torch.autograd.graph.saved_tensors_hooks`; nothing is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

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


def kept_bytes_per_row(model: Any, *, seq_len: int) -> dict[str, int]:
    """Measure the bytes that the base model keeps of one row with fused attention, by `training.precision`.

    Args:
        model: of transformers, on the meta device; its precision and its attention are as before afterwards.
        seq_len: tokens of the row.

    Returns: nothing if the model cannot be run on the meta device, such as one that reads the values of a router.
    """
    before, dtype, was_training = model.config._attn_implementation, model.dtype, model.training
    try:
        model.set_attn_implementation(ATTENTION)
        model.train()
        return {name: _kept_bytes(model.to(of_probe), seq_len=seq_len) for name, of_probe in _DTYPES.items()}
    except Exception:  # any code of transformers may fail without values
        return {}
    finally:
        model.set_attn_implementation(before)
        model.to(dtype).train(was_training)


def _kept_bytes(model: Any, *, seq_len: int) -> int:
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no other storage gets its address
        return tensor

    tokens = torch.zeros(1, seq_len, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.base_model(input_ids=tokens, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
