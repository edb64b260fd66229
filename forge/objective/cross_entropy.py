"""What is minimised: the summed cross entropy of the next token.

The plain way makes all logits of the micro-batch, copies them to fp32, and keeps what the backward
pass needs: for a vocabulary V and N tokens about N·V·12 bytes, most of a small model's memory. The
chunked way computes logits, loss and gradient for a few rows at a time inside the forward pass, so
that no logit outlives its chunk; the arithmetic is the same three matrix products, and the softmax is
in fp32 either way. The idea is known from the Liger kernels (arXiv 2410.10989, section 3.2) and from
Apple's cut cross entropy (arXiv 2411.09009); this is the plain-torch form that also runs on CPUs.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORED = -100
"""A target that carries no loss, as everywhere in torch."""

# Logits per chunk: what fits a core's cache on CPU, what fills the device on CUDA.
_CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}


class CausalLm(nn.Module):
    """A language model that returns its summed loss.

    It begins with the model's own loss; `use_chunks` switches to the chunked one, for models whose
    logits are a linear map of the last hidden state (ModelInfo.has_linear_head).

    Args:
        model: a transformers causal LM, or a module whose `forward(input_ids)` returns logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.chunked = False

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross entropies of `targets` that are not IGNORED, in fp32.

        Shapes: tokens, targets: int64[B, T], targets[b, t] following tokens[b, t]; returns float32[].
        """
        if not isinstance(self.model, PreTrainedModel):
            logits = self.model(tokens).flatten(0, 1).float()
            return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        if not self.chunked:
            out = self.model(
                input_ids=tokens, labels=targets, shift_labels=targets, num_items_in_batch=1, use_cache=False
            )
            loss: Tensor = out.loss
            return loss
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        # Through the head's own __call__, so that ZeRO 3 gathers its weight.
        summed: Tensor = self.model.get_output_embeddings()(hidden, targets=targets)
        return summed

    def use_chunks(self) -> None:
        """Compute the loss in chunks from here on."""
        assert isinstance(self.model, PreTrainedModel), "only a transformers model is known to have a linear head"
        head: Any = self.model.get_output_embeddings()
        head.forward = types.MethodType(_head_forward, head)
        self.chunked = True


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of `hidden @ weight.T + bias`, without ever holding all logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Shapes: hidden: [N, H], weight: [V, H], bias: [V] or None, targets: int64[N]; returns float32[]."""
        needs_gradient = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        # Summed over chunks in fp32: in bf16 every further chunk would round the sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_gradient and bias is not None else None
        rows = max(16, _CHUNK_LOGITS.get(hidden.device.type, 2**26) // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk, goals = hidden[start : start + rows], targets[start : start + rows]
            kept = goals != IGNORED
            index = goals.where(kept, 0).unsqueeze(1)
            logits = F.linear(chunk, weight, bias).float()
            largest = logits.amax(dim=1, keepdim=True)
            goal_logits = logits.gather(1, index)
            powers = logits.sub_(largest).exp_()
            sums = powers.sum(dim=1, keepdim=True)
            total += ((sums.log() + largest - goal_logits) * kept.unsqueeze(1)).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot, for the rows that count.
            grad_logits = powers.mul_(kept.unsqueeze(1) / sums)
            grad_logits.scatter_add_(1, index, -kept.unsqueeze(1).float())
            grad_low = grad_logits.to(hidden.dtype)
            torch.mm(grad_low, weight, out=grad_hidden[start : start + rows])
            grad_weight += grad_low.T @ chunk
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """Scale the gradients that the forward pass has already made."""
        (grad,) = grad_outputs
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype),
            (grad_weight * grad).to(ctx.weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(ctx.weight_dtype),
            None,
        )


def _head_forward(head: nn.Linear, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
    if targets is None:
        return F.linear(hidden, head.weight, head.bias)
    loss: Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, targets.reshape(-1)
    )
    return loss
