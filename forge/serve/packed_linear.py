"""bf16 linear layers on the CPU whose weights are stored as oneDNN's kernels read them.

Otherwise every product rearranges the weight first, which takes about as long as the product of a few tokens.
Layers that read the same tensor, such as the projections to queries, keys and values, are computed as one product.
The results have the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 4
"""For which the layout is chosen; with more tokens it is as fast as one chosen for them."""
_READ_ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling layers that models call with the same tensor."""
_VECTOR = 64
"""Widths that are no multiple of this stay apart: kernels would read such parts of rows in other steps."""


class PackedProduct:
    """The product with the weights of one linear layer, or of several that read the same tensor."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases: list[Any] = [layer.bias for layer in layers]
        self._bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        ops: Any = torch.ops.mkldnn
        self.weight: Tensor = ops._reorder_linear_weight(weight, _TOKENS)
        self._made: tuple[Tensor, dict[int, Tensor]] | None = None

    def part(self, number: int, inputs: Tensor) -> Tensor:
        """The outputs of one of the layers."""
        if len(self._sizes) == 1:
            return self._product(inputs)
        made = self._made
        if made is None or made[0] is not inputs or number not in made[1]:
            parts = torch.split(self._product(inputs), self._sizes, dim=-1)
            self._made = made = (inputs, dict(enumerate(parts)))
        part = made[1].pop(number)
        if not made[1]:
            self._made = None
        return part

    def _product(self, inputs: Tensor) -> Tensor:
        jit: Any = torch.jit
        product = _script() if jit.is_tracing() else _packed_product
        found: Tensor = product(inputs, self.weight, self._bias)
        return found


def pack_linears(model: nn.Module) -> list[PackedProduct]:
    """Pack the weights of all linear layers that can be. Returns: the products that compute them.

    A packed layer's `weight` is not kept, unless another module uses it too, such as tied embeddings: it is all nan
    and takes no memory.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    products = []
    for layers in _groups(model):
        product = PackedProduct(layers)
        products.append(product)
        for number, layer in enumerate(layers):
            layer.forward = partial(product.part, number)
            if uses[id(layer.weight)] == 1:
                empty = torch.full((), float("nan"), dtype=torch.bfloat16).expand(layer.weight.shape)
                layer.weight = nn.Parameter(empty, requires_grad=False)
    return products


def _groups(model: nn.Module) -> Iterator[list[Any]]:
    """Every layer that can be packed once, with those that read the same tensor."""
    grouped: set[nn.Module] = set()
    for module in model.modules():
        for names in _READ_ALIKE:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(map(_is_packable, layers)) and _can_join(layers):
                grouped.update(layers)
                yield layers
    for module in model.modules():
        if module not in grouped and _is_packable(module):
            yield [module]


def _is_packable(layer: Any) -> bool:
    if type(layer) is not nn.Linear:
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.bfloat16


def _can_join(layers: Sequence[nn.Linear]) -> bool:
    kinds = {(layer.in_features, layer.bias is None) for layer in layers}
    return len(kinds) == 1 and not any(layer.out_features % _VECTOR for layer in layers)


@cache
def _script() -> Any:
    """The product as a script, since a trace cannot record its arguments."""
    return torch.jit.script(_packed_product)


def _packed_product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    scalars: list[int | float | complex | None] = []
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", scalars, "")  # type: ignore[no-any-return]
