"""The Lion optimizer: the sign of an interpolation between momentum and gradient.

torch has none, and DeepSpeed's is compiled at run time. Each element is updated by itself, so any shard will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """`u = sign(β1·m + (1 - β1)·g)`, `p ← (1 - lr·decay)·p - lr·u`, `m ← β2·m + (1 - β2)·g`.

    Source: arXiv 2302.06675, program 1.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
                momentum = state["exp_avg"]
                update = momentum.lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)
