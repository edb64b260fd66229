"""The loss of embeddings with in-batch negatives, over the texts of all ranks.

Each rank computes the terms of its own queries against the texts of all ranks, and their gradient with respect to
all embeddings; the gradients are added over the ranks. So what a rank passes to its model is the gradient of the
whole loss, whichever rank computed it.

Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748,
equation 4; Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), arXiv
2101.06983, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from forge.config.embedding import ContrastiveSpec

_MAX_SCORES = 1 << 24
"""Similarities that are in memory at once: 64 MiB in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Embeddings of texts, in order: each query is followed by its positive, and that by its negatives.

    Shapes: embeddings: float32[n, d]; parts: int64[n], 1 for a query, 2 for a positive, more for negatives, 0 for
    what only fills up; contents: int64[n], equal for equal texts; groups: int64[n], only texts of one group are
    compared.
    """

    embeddings: Tensor
    parts: Tensor
    contents: Tensor
    groups: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class InBatchLoss:
    """The loss of some texts of this rank.

    Shapes: gradients: float32[n, d], of the sum of all ranks' terms; losses, hits, reciprocal_ranks: float32[n],
    those of each query at its place and 0 elsewhere.
    """

    gradients: Tensor
    losses: Tensor
    hits: Tensor
    reciprocal_ranks: Tensor


def in_batch_loss(own: Texts, *, spec: ContrastiveSpec) -> InBatchLoss:
    """Compare the texts of this rank with those of all; collective.

    The loss of a query is the cross entropy of its positive among all positives and negatives of its group. A text
    that equals the positive is no negative. A positive that is no nearer than another text counts as further away.
    """
    every, start = _gathered(own)
    values = every.embeddings.detach().requires_grad_()
    losses, hits, reciprocal_ranks = torch.zeros(3, len(own.parts), device=values.device)
    queries = torch.nonzero(own.parts == 1).flatten()
    all_queries = torch.nonzero(every.parts == 1).flatten()
    passages = torch.nonzero(every.parts > 1).flatten()
    with torch.enable_grad():
        for some in torch.split(queries, max(1, _MAX_SCORES // max(1, len(passages)))):
            at = some + start
            terms = _terms(at, goals=at + 1, among=passages, every=every, values=values, spec=spec)
            total = terms.losses
            if spec.symmetric:
                back = _terms(at + 1, goals=at, among=all_queries, every=every, values=values, spec=spec)
                total = (total + back.losses) / 2
            torch.autograd.backward(total.sum())
            losses[some] = total.detach()
            hits[some] = (terms.ranks == 1).float()
            reciprocal_ranks[some] = 1 / terms.ranks
    gradients = torch.zeros_like(values) if values.grad is None else values.grad
    if dist.is_initialized():
        dist.all_reduce(gradients)
    return InBatchLoss(
        gradients=gradients[start : start + len(own.parts)],
        losses=losses,
        hits=hits,
        reciprocal_ranks=reciprocal_ranks,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """Shapes: losses: float32[q], with gradient; ranks: float32[q], 1 for a goal that is nearest."""

    losses: Tensor
    ranks: Tensor


def _terms(
    anchors: Tensor, *, goals: Tensor, among: Tensor, every: Texts, values: Tensor, spec: ContrastiveSpec
) -> _Terms:
    """The cross entropy of the goal of each anchor. Shapes: anchors, goals: int64[q]; among: int64[c]."""
    scores = values[anchors] @ values[among].T / spec.temperature
    is_goal = among == goals[:, None]
    is_other_group = every.groups[among] != every.groups[anchors][:, None]
    is_equal = every.contents[among] == every.contents[goals][:, None]
    scores = scores.masked_fill(is_other_group | (is_equal & ~is_goal), -torch.inf)
    own = (values[anchors] * values[goals]).sum(dim=1) / spec.temperature
    own_score = scores.detach()[is_goal]
    ranks = (scores.detach() >= own_score[:, None]).sum(dim=1)
    return _Terms(losses=torch.logsumexp(scores, dim=1) - own, ranks=ranks.float())


def _gathered(own: Texts) -> tuple[Texts, int]:
    """The texts of all ranks in the order of the ranks, and where those of this rank begin; collective."""
    if not dist.is_initialized():
        return own, 0
    world_size, device = dist.get_world_size(), own.parts.device
    sizes = torch.zeros(world_size, dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = len(own.parts)
    dist.all_reduce(sizes)
    counts = sizes.tolist()
    numbers = torch.stack([own.parts, own.contents, own.groups], dim=1)
    parts, contents, groups = _all_gather(numbers, counts=counts).unbind(dim=1)
    embeddings = _all_gather(own.embeddings.detach(), counts=counts)
    texts = Texts(embeddings=embeddings, parts=parts, contents=contents, groups=groups)
    return texts, sum(counts[: dist.get_rank()])


def _all_gather(own: Tensor, *, counts: list[int]) -> Tensor:
    """Concatenate the rows of all ranks, of which each has another number."""
    padded = own.new_zeros(max(counts), own.shape[1])
    padded[: len(own)] = own
    every = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(every, padded)
    return torch.cat([rows[:count] for rows, count in zip(every, counts, strict=True)])
