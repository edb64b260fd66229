"""The summed cross entropy of the next token, computed in chunks.

The plain way makes all logits of the micro-batch, copies them to fp32, and keeps what the backward
pass needs: for a vocabulary V and N tokens about N·V·12 bytes, most of a small model's memory. The
chunked way computes logits, loss and gradient for a few rows at a time inside the forward pass, so
that no logit outlives its chunk; the arithmetic is the same three matrix products, and the softmax is
in fp32 either way. The idea is known from the Liger kernels (arXiv 2410.10989, section 3.2) and from
Apple's cut cross entropy (arXiv 2411.09009); this is the plain-torch form that also runs on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge.objective.base import IGNORED

# Logits per chunk: what fits a core's cache on CPU, what fills the device on CUDA.
_CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of `hidden @ weight.T + bias`, without ever holding all logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Shapes: hidden: [N, H], weight: [V, H], bias: [V] or None, targets: int64[N]; returns float32[]."""
        needs_gradient = any(ctx.needs_input_grad)
        # A frozen head (adapters) needs no gradient of its own.
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        # Summed over chunks in fp32: in bf16 every further chunk would round the sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        rows = max(16, _CHUNK_LOGITS.get(hidden.device.type, 2**26) // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk, goals = hidden[start : start + rows], targets[start : start + rows]
            kept = goals != IGNORED
            index = goals.where(kept, 0).unsqueeze(1)
            logits = F.linear(chunk, weight, bias)
            probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
            # log Σ exp(logits) = largest logit - log of its probability, which is at least 1 / V
            largest = logits.amax(dim=1, keepdim=True).float()
            log_sums = largest - probabilities.amax(dim=1, keepdim=True).log()
            total += ((log_sums - logits.gather(1, index).float()) * kept.unsqueeze(1)).sum()
            if grad_hidden is None:
                continue
            # d loss / d logits = softmax - one-hot, for the rows that count.
            grad_logits = probabilities.scatter_add_(1, index, -torch.ones_like(log_sums))
            if grad_logits.is_cuda or not kept.all():  # a GPU would wait for the answer
                grad_logits *= kept.unsqueeze(1)
            grad_low = grad_logits.to(hidden.dtype)
            torch.mm(grad_low, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad_low.T @ chunk
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Scale the gradients that the forward pass has already made."""
        (grad,) = grad_outputs
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(ctx.weight_dtype),
            None,
        )


def chunked_head_forward(head: nn.Linear, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
    """The forward of a linear head that returns the summed loss of `targets`; without them, logits as before."""
    if targets is None:
        return F.linear(hidden, head.weight, head.bias)
    loss: Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, targets.reshape(-1)
    )
    return loss
