"""bf16 linear layers on the CPU whose weights are stored as oneDNN's kernels read them.

Otherwise every product rearranges the weight first, which takes about as long as the product of a few tokens. The
results have the same bits.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 4
"""For which the layout is chosen; with more tokens it is as fast as one chosen for them."""


def pack_linears(model: nn.Module) -> int:
    """Pack the weights of all linear layers that can be. Returns: how many.

    A packed layer's `weight` is not kept, unless another module uses it too, such as tied embeddings: it is all nan
    and takes no memory.
    """
    ops: Any = torch.ops.mkldnn
    if not ops._is_mkldnn_bf16_supported():
        return 0
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    layers: list[Any] = [one for one in model.modules() if type(one) is nn.Linear and _is_packable(one.weight)]
    for layer in layers:
        packed = ops._reorder_linear_weight(layer.weight.detach(), _TOKENS)
        layer.forward = partial(
            ops._linear_pointwise, W=packed, B=layer.bias, attr="none", scalars=[], algorithm=""
        )
        if uses[id(layer.weight)] == 1:
            empty = torch.full((), float("nan"), dtype=torch.bfloat16).expand(layer.weight.shape)
            layer.weight = nn.Parameter(empty, requires_grad=False)
    return len(layers)


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16
