"""How far the distribution of a student is from that of its teacher.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}
"""Logits whose distributions are in memory at once, in fp32."""


def forward_divergence(student: Tensor, teacher: Tensor, *, temperature: float, top_k: int | None) -> Tensor:
    """`T² · KL(p_T ‖ q_T)` of each position, with p_T the teacher's and q_T the student's distribution at
    temperature T.

    The distributions of a few positions are computed at a time, and again in the backward pass.

    Args:
        top_k: compare the teacher's most probable tokens, and the probability of all others together.

    Shapes: student, teacher: float[n, V]. Returns: float32[n].
    """
    return _in_chunks(_divergence, student, teacher, temperature, top_k)


def stored_divergence(student: Tensor, *, tokens: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """`forward_divergence` with a `top_k`, from what `top_log_probs` gave of the teacher.

    Shapes: student: float[n, V]; tokens: int64[n, k]; log_probs: float32[n, k]. Returns: float32[n].
    """
    return _in_chunks(_from_top, student, tokens, log_probs, temperature)


def top_log_probs(teacher: Tensor, *, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest log-probabilities at temperature T, descending, and their tokens.

    Shapes: teacher: float[n, V]. Returns: float32[n, k], int64[n, k].
    """
    return torch.log_softmax(teacher.float() / temperature, dim=1).topk(top_k, dim=1)


def _in_chunks(function: Callable[..., Tensor], student: Tensor, *arguments: Any) -> Tensor:
    """Call a function on a few rows of all tensors at a time."""
    rows = max(16, _CHUNK_LOGITS.get(student.device.type, 2**26) // student.shape[1])
    found = []
    for start in range(0, max(1, len(student)), rows):
        own = [one[start : start + rows] if isinstance(one, Tensor) else one for one in (student, *arguments)]
        found.append(checkpoint(function, *own, use_reentrant=False))
    return torch.cat(found)


def _divergence(student: Tensor, teacher: Tensor, temperature: float, top_k: int | None) -> Tensor:
    if top_k is not None and top_k < teacher.shape[1]:
        top, tokens = top_log_probs(teacher, temperature=temperature, top_k=top_k)
        return _from_top(student, tokens, top, temperature)
    log_q = torch.log_softmax(student.float() / temperature, dim=1)
    log_p = torch.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _from_top(student: Tensor, tokens: Tensor, top: Tensor, temperature: float) -> Tensor:
    compared = torch.log_softmax(student.float() / temperature, dim=1).gather(1, tokens)
    kept = (top.exp() * (top - compared)).sum(dim=1)
    if tokens.shape[1] == student.shape[1]:
        return temperature**2 * kept
    rest_p, rest_q = _log_rest(top), _log_rest(compared)
    return temperature**2 * (kept + rest_p.exp() * (rest_p - rest_q))


def _log_rest(log_probs: Tensor) -> Tensor:
    """Log of the probability that is left; at least that of one rounding error of fp32."""
    return torch.log((1 - log_probs.exp().sum(dim=1)).clamp(min=2.0**-24))
