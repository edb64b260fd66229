"""Values of adapters: how they begin, and what a weight is with its adapter added (merged).

They begin as in the papers, so that a model with new adapters computes what it computed without them: `A` is
random, `B` is zero, and DoRA's magnitudes are the lengths of the rows of the pretrained weight. Each `A` is drawn
from the stream of (seed, its name), so it depends neither on the number of workers nor on the ZeRO stage.

Source: LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353, equation 5; peft 0.21.2,
`reset_lora_parameters`, `DoraLinearLayer.update_layer`, `ParamWrapper.get_delta_weight`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from forge.model.adapters import AdapterLayer
from forge.model.init import stream
from forge.model.pretrained import PretrainedWeights
from forge.model.weight_files import TensorReader


class AdaptedWeights:
    """The initial values of a model with adapters: those of the pretrained weights, and of the adapters."""

    def __init__(
        self,
        base: PretrainedWeights,
        layers: Sequence[AdapterLayer],
        *,
        shapes: Mapping[str, tuple[int, ...]],
        types: Mapping[str, torch.dtype],
        seed: int,
        earlier: Mapping[str, TensorReader] | None = None,
    ) -> None:
        """Args:
        shapes: of every parameter of the model, by its unwrapped name.
        types: likewise.
        earlier: what another run has trained of these adapters, and of the weights beside them.
        """
        self._base, self._shapes, self._types, self._seed = base, shapes, types, seed
        self._earlier = earlier or {}
        self._layers = {f"{layer.prefix}.{part}.weight": (layer, part) for layer in layers for part in layer.parts}

    def __contains__(self, name: str) -> bool:
        return name in self._layers or name in self._base or name in self._earlier

    @torch.no_grad()
    def read_into(self, name: str, out: Tensor, *, start: int = 0) -> None:
        """Fill a flat tensor with elements from `start` on, converted to its type. Raises: OSError, EOFError."""
        if name in self._earlier:
            self._earlier[name].read_into(out, start=start)
            return
        if name not in self._layers:
            self._base.read_into(name, out, start=start)
            return
        layer, part = self._layers[name]
        if part == "lora_A":
            whole = first_factor(self._shapes[name], seed=self._seed, name=name)
            out.copy_(whole.view(-1)[start : start + out.numel()])
        elif part == "lora_B":
            out.zero_()
        else:
            out.copy_(self._magnitudes(layer, start=start, stop=start + out.numel()))

    def _magnitudes(self, layer: AdapterLayer, *, start: int, stop: int) -> Tensor:
        """The lengths of rows `start` to `stop` of a weight of outputs × inputs, in the model's type."""
        num_rows, num_columns = self._shapes[layer.weight]
        dtype = self._types[layer.weight]
        if layer.is_transposed:
            whole = torch.empty(num_rows * num_columns, dtype=dtype)
            self._base.read_into(layer.weight, whole)
            return _row_lengths(whole.view(num_rows, num_columns).T)[start:stop]
        rows = torch.empty((stop - start) * num_columns, dtype=dtype)
        self._base.read_into(layer.weight, rows, start=start * num_columns)
        return _row_lengths(rows.view(-1, num_columns))


def _row_lengths(weight: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(weight.float(), dim=1)
    return lengths


def first_factor(shape: tuple[int, ...], *, seed: int, name: str) -> Tensor:
    """Draw an adapter's `A`: uniform, as torch begins a linear layer."""
    generator = torch.Generator().manual_seed(stream(seed, name))
    whole = torch.empty(shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    return whole


@torch.no_grad()
def merged(
    weight: Tensor, layer: AdapterLayer, *, factor_a: Tensor, factor_b: Tensor, magnitude: Tensor | None = None
) -> Tensor:
    """Return a weight with its adapter added.

    Shapes: weight: float32[O, I], or [I, O] if the layer is transposed, of experts [E, O, I] or [E, I, O];
        factor_a: float32[E·rank, I], factor_b: float32[O, E·rank], magnitude: float32[O]; E is 1 without experts.
    """
    if layer.num_experts > 1:
        lows = factor_a.view(layer.num_experts, -1, factor_a.shape[1])
        highs = factor_b.view(factor_b.shape[0], -1, layer.num_experts)
        delta = torch.einsum("ore,eri->eio" if layer.is_transposed else "ore,eri->eoi", highs, lows)
        return weight + layer.scaling * delta
    rows = weight.T if layer.is_transposed else weight
    added = rows + layer.scaling * (factor_b @ factor_a)
    if magnitude is not None:
        added = (magnitude / _row_lengths(added)).unsqueeze(1) * added
    return added.T.contiguous() if layer.is_transposed else added
