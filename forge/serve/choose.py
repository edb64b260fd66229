"""Choose the next token of several sequences at once, each by its own sampling parameters and random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forge.inference.running import RunningSequence
from forge.inference.sampling import SamplingParams

_BLOCK = 256
_CANDIDATES = 1024
"""Tokens among which top_p is looked for, before all are sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A token, and log-probabilities of the model at temperature 1 if they are asked for."""

    token_id: int
    """-1 if the logits are not numbers, so that none can be chosen."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def choose(logits: Tensor, sequences: Sequence[RunningSequence]) -> list[Choice]:
    """Choose one token per row of float32[N, V] logits.

    A row's choice depends on its own logits and on the next random number of its sequence alone.
    """
    scores = _penalised(logits, sequences)
    drawn = [index for index, one in enumerate(sequences) if one.sampling.temperature > 0]
    if len(drawn) == len(sequences):
        tokens = _draw(scores, sequences)
    else:
        tokens = scores.argmax(dim=-1)  # of one that is not a number, if there is one
        tokens = tokens.where(scores.gather(1, tokens[:, None])[:, 0].isfinite(), -1)
        if drawn:
            tokens[drawn] = _draw(scores[drawn], [sequences[index] for index in drawn])
    ids = tokens.tolist()
    asked = [index for index, one in enumerate(sequences) if one.sampling.logprobs is not None]
    if not asked:
        return [Choice(token_id=token) for token in ids]
    most = max(sequences[index].sampling.logprobs or 0 for index in asked)
    known = logits[asked].log_softmax(dim=-1)
    chosen = known.gather(1, tokens[asked].clamp(min=0)[:, None])[:, 0].tolist()
    top = known.topk(min(most, known.shape[1]), dim=-1)
    values, indices = top.values.tolist(), top.indices.tolist()
    choices = [Choice(token_id=token) for token in ids]
    for place, index in enumerate(asked):
        count = sequences[index].sampling.logprobs or 0
        pairs = tuple(zip(indices[place][:count], values[place][:count], strict=True))
        choices[index] = Choice(token_id=ids[index], logprob=chosen[place], top=pairs)
    return choices


def _penalised(logits: Tensor, sequences: Sequence[RunningSequence]) -> Tensor:
    """Divide positive logits of known tokens by the repetition penalty, and multiply negative ones by it."""
    rows = [index for index, one in enumerate(sequences) if one.sampling.repetition_penalty != 1]
    if not rows:
        return logits
    scores = logits.clone()
    for row in rows:
        known = torch.tensor(sorted(set(sequences[row].tokens)), device=logits.device)
        found, penalty = scores[row, known], sequences[row].sampling.repetition_penalty
        scores[row, known] = torch.where(found > 0, found / penalty, found * penalty)
    return scores


def _draw(scores: Tensor, sequences: Sequence[RunningSequence]) -> Tensor:
    sampling = [one.sampling for one in sequences]
    scores = scores / scores.new_tensor([one.temperature for one in sampling])[:, None]
    limited = [index for index, one in enumerate(sampling) if one.top_k or one.top_p < 1 or one.min_p]
    if limited:
        lowest = scores.new_full((len(scores), 1), float("-inf"))
        lowest[limited, 0] = _lowest_kept(scores[limited], [sampling[index] for index in limited])
        scores = scores.masked_fill(scores < lowest, float("-inf"))
    uniform = torch.tensor([one.random.random() for one in sequences], dtype=torch.float64)
    return _at_quantile(scores.softmax(dim=-1), uniform.to(scores.device))


def _lowest_kept(scores: Tensor, sampling: Sequence[SamplingParams]) -> Tensor:
    """The lowest score of each row that top_k, then top_p of what is left, and min_p keep."""
    size = scores.shape[1]
    top_k = scores.new_tensor([one.top_k or size for one in sampling]).clamp(max=size).long()
    top_p = scores.new_tensor([one.top_p for one in sampling])
    min_p = scores.new_tensor([one.min_p or 0.0 for one in sampling])
    num = min(_CANDIDATES, size)
    while True:
        best = scores.topk(num, dim=-1).values
        within = torch.arange(num, device=scores.device) < top_k[:, None]
        whole = scores.logsumexp(dim=-1, keepdim=True)
        part = best.masked_fill(~within, float("-inf")).logsumexp(dim=-1, keepdim=True)
        total = torch.where(top_k[:, None] <= num, part, whole)
        share = (best - total).exp().masked_fill(~within, 0.0)
        before = share.cumsum(dim=-1) - share
        kept = (
            within
            & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
            & (best >= best[:, :1] + min_p.log()[:, None])
        )
        kept[:, 0] = True
        count = kept.sum(dim=-1)
        unknown = (count == num) & (num < size)
        if not unknown.any() or num == size:
            break
        num = size
    return best.gather(1, (count - 1)[:, None])[:, 0]


def _at_quantile(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability exceeds `uniform`; sums of blocks first, then within one."""
    rows, size = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -size % _BLOCK)).view(rows, -1, _BLOCK)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniform[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inner = blocks[torch.arange(rows, device=blocks.device), block[:, 0]].double().cumsum(dim=-1)
    last = torch.nextafter(inner[:, -1:], torch.zeros_like(inner[:, -1:]))
    place = torch.searchsorted(inner, torch.minimum(target - before, last), right=True)
    return (block * _BLOCK + place).where(ends[:, -1:].isfinite(), -1)[:, 0]
