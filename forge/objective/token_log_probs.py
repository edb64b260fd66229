"""Log-probabilities of chosen tokens, computed in chunks.

The plain way makes all logits, copies them to fp32 and keeps them for the backward pass. The chunked way computes a
few rows of logits at a time, keeps none, and computes them again in the backward pass, where the gradient of each
token's log-probability is known: four matrix products instead of three, and no more memory than one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits per chunk: what fits a core's cache on CPU, what fills the device on CUDA.
_CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax of `hidden @ weight.T + bias` at one token for each row, without ever holding all logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        """Shapes: hidden: [N, H], weight: [V, H], bias: [V] or None, tokens: int64[N]; returns float32[N]."""
        found = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
        for chosen in _chunks(hidden, vocab_size=weight.shape[0]):
            logits = F.linear(hidden[chosen], weight, bias).float()
            found[chosen] = log_probs_of(logits, tokens[chosen])
        ctx.save_for_backward(hidden, weight, bias, tokens)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """d log p / d logits = one-hot - softmax, times the gradient of each row."""
        (grad,) = grad_outputs
        hidden, weight, bias, tokens = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in fp32: in bf16 every further chunk would round the sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        for chosen in _chunks(hidden, vocab_size=weight.shape[0]):
            logits = F.linear(hidden[chosen], weight, bias).float()
            scale = grad[chosen].unsqueeze(1)
            grad_logits = logits.softmax(dim=1).mul_(-scale)
            grad_logits.scatter_add_(1, tokens[chosen].unsqueeze(1), scale.to(grad_logits.dtype))
            grad_low = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_low, weight, out=grad_hidden[chosen])
            if grad_weight is not None:
                grad_weight += grad_low.T @ hidden[chosen]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
        )


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of one token for each row of logits. Shapes: float[N, V], int64[N] → float32[N]."""
    logits = logits.float()
    goals = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return goals - torch.logsumexp(logits, dim=1)


def log_prob_head_forward(head: nn.Linear, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The forward of a linear head that returns log-probabilities of `tokens`; without them, logits as before."""
    if tokens is None:
        return F.linear(hidden, head.weight, head.bias)
    found: Tensor = ChunkedLogProbs.apply(hidden, head.weight, head.bias, tokens)  # type: ignore[no-untyped-call]
    return found


def _chunks(hidden: Tensor, *, vocab_size: int) -> list[slice]:
    rows = max(16, _CHUNK_LOGITS.get(hidden.device.type, 2**26) // vocab_size)
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]
