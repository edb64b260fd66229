"""How far the distribution of a student is from that of its teacher.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
"""

from __future__ import annotations

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
    rows = max(16, _CHUNK_LOGITS.get(student.device.type, 2**26) // student.shape[1])
    chunks = zip(torch.split(student, rows), torch.split(teacher, rows), strict=True)
    found = [checkpoint(_divergence, *pair, temperature, top_k, use_reentrant=False) for pair in chunks]
    return torch.cat(found)


def _divergence(student: Tensor, teacher: Tensor, temperature: float, top_k: int | None) -> Tensor:
    log_q = torch.log_softmax(student.float() / temperature, dim=1)
    log_p = torch.log_softmax(teacher.float() / temperature, dim=1)
    if top_k is None or top_k >= log_p.shape[1]:
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1)
    top, tokens = log_p.topk(top_k, dim=1)
    compared = log_q.gather(1, tokens)
    kept = (top.exp() * (top - compared)).sum(dim=1)
    rest_p, rest_q = _log_rest(top), _log_rest(compared)
    return temperature**2 * (kept + rest_p.exp() * (rest_p - rest_q))


def _log_rest(log_probs: Tensor) -> Tensor:
    """Log of the probability that is left; at least that of one rounding error of fp32."""
    return torch.log((1 - log_probs.exp().sum(dim=1)).clamp(min=2.0**-24))
