"""AdamW with moments in 8 bits, by bitsandbytes.

bitsandbytes quantises each block of 256 elements of a parameter with one scale. At ZeRO 0, the only stage it is
offered for, every rank has whole parameters and the same state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forge.errors import PlanError
from forge.model.quantise import without_hub_kernels

_STATES: Mapping[str, str] = {"1": "exp_avg", "2": "exp_avg_sq"}
"""Number in bitsandbytes' names → kind of a checkpoint."""


def build_8bit(groups: Sequence[dict[str, Any]], *, hyperparameters: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Build bitsandbytes' AdamW8bit. Raises: PlanError if bitsandbytes cannot be imported."""
    try:
        with without_hub_kernels():
            import bitsandbytes
    except ImportError as error:
        raise PlanError(
            f"adamw-8bit needs bitsandbytes, which cannot be imported ({error}); install it on every machine, or "
            "use lion, whose state is half of adamw's",
            job_key="training.optimizer.name",
        ) from error
    build: Any = bitsandbytes.optim
    optimizer: torch.optim.Optimizer = build.AdamW8bit(groups, **hyperparameters)
    return optimizer


@torch.no_grad()
def reset_8bit(optimizer: Any) -> None:
    """Create the state of every parameter, which bitsandbytes would create at its first step, with step 0."""
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, i, j)
            state = optimizer.state[parameter]
            state["step"] = 0
            for _, tensor in state_8bit(state):
                tensor.zero_()


def state_8bit(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the kinds of a parameter's state with their tensors; of a small parameter it is not quantised."""
    for number, kind in _STATES.items():
        values = state[f"state{number}"]
        if values.dtype == torch.uint8:
            yield f"{kind}_8bit", values
            yield f"{kind}_absmax", state[f"absmax{number}"]
        else:
            yield kind, values
