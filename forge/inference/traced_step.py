"""Steps without prompts as one call into TorchScript, which runs the kernels without the modules' Python code.

With one text that code takes half of a step on the CPU. A trace has the bits of the modules, since it calls the
same kernels, and runs without the interpreter's lock, so that the event loop goes on meanwhile. `PackedModel`
compares both before it uses a trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from forge.inference.packed_rows import Rows, RowsFrom, StepLayout, TracedLayout, attend_newest, using

_JIT: Any = torch.jit
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Token ids, positions and places of the batch whose logits are wanted → logits."""


class HeldWeight(Protocol):
    """Holds a weight that a trace cannot hold as a constant."""

    weight: Tensor


class TracedStep:
    """A model's step, for any number of decoding sequences.

    Args:
        compute: what is traced; it uses attention over rows.
        rows: which have been used.
        layout: with which a step like that of `inputs` has just been computed.
        held: weights that become inputs.

    Raises: RuntimeError if the model's Python code depends on values of tensors; an error of torch.jit.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        rows: Rows,
        layout: StepLayout,
        inputs: tuple[Tensor, Tensor, Tensor],
        held: Sequence[HeldWeight],
    ) -> None:
        self._compute, self._held = compute, held
        self._weights = [one.weight for one in held]
        self._layers = list(rows.layers)
        self._masks = dict(layout.decoding_masks)
        if len(self._masks) < len(layout.decoding_masks):
            raise RuntimeError("layers group their heads differently")
        with warnings.catch_warnings(
            record=True
        ) as caught:  # torch.jit is deprecated, and has no successor for this
            warnings.simplefilter("always")
            self._attend: Any = _JIT.script(attend_newest)
            state = self._state(rows, layout)
            self._trace: Any = _JIT.trace(self._traced, (*inputs, *state), check_trace=False)
        _require_fixed_code(caught)

    def __call__(self, inputs: tuple[Tensor, Tensor, Tensor], *, layout: StepLayout) -> Tensor:
        """Compute the logits of a step."""
        with _JIT.optimized_execution(False):  # whose fusions could change bits
            logits: Tensor = self._trace(*inputs, *self._state(layout.rows, layout))
        return logits

    def _state(self, rows: Rows | RowsFrom, layout: StepLayout) -> list[Tensor]:
        masks = [layout.decoding_mask(window=window, group=group) for window, group in self._masks.items()]
        layers = [tensor for index in self._layers for tensor in rows.layers[index]]
        return [layout.indices, layout.positions, *masks, *layers, *self._weights]

    def _traced(self, ids: Tensor, at: Tensor, keep: Tensor, *state: Tensor) -> Tensor:
        rest = iter(state)
        layout = TracedLayout(
            indices=next(rest),
            positions=next(rest),
            masks={window: next(rest) for window in self._masks},
            layers={index: (next(rest), next(rest)) for index in self._layers},
            attend=self._attend,
        )
        try:
            for one, weight in zip(self._held, rest, strict=True):
                one.weight = weight
            with using(layout):
                return self._compute(ids, at, keep)
        finally:
            for one, weight in zip(self._held, self._weights, strict=True):
                one.weight = weight


def _require_fixed_code(caught: Sequence[warnings.WarningMessage]) -> None:
    """Raises: RuntimeError if a model's code decided by values of tensors; torch's own compares weights' sizes."""
    own = str(Path(torch.__file__).parent)
    for one in caught:
        if issubclass(one.category, _JIT.TracerWarning) and not one.filename.startswith(own):
            raise RuntimeError(f"the model's code depends on values: {one.filename}:{one.lineno}")
