"""Embeddings of texts: those that belong together are near to each other, and far from all others of the step.

Negatives are all texts of the global batch, on every rank and in every micro-batch, so the loss cannot be computed
in one forward pass. It takes two: the first one embeds all texts without gradient; from their embeddings follow the
loss and its gradient with respect to each; the second one passes that gradient to the model. Memory is that of one
micro-batch. A step of a single micro-batch needs one pass only.

Source: GradCache, arXiv 2101.06983; `forge.objective.in_batch`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from forge.config.embedding import ContrastiveSpec
from forge.model.router_loss import router_losses_of
from forge.objective.base import Arrays, ObjectiveContext, WeightedSum
from forge.objective.in_batch import InBatchLoss, Texts, in_batch_loss
from forge.objective.registry import OBJECTIVES, Direction
from forge.objective.router import Routers, position_sums, with_router_losses
from forge.objective.text_parts import TextParts


class Contrastive:
    """Text embeddings by transformers models without a head, with in-batch negatives."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["contrastive"].metrics

    def __init__(self, *, context: ObjectiveContext) -> None:
        self._spec: ContrastiveSpec = context.training.contrastive
        self._rows_per_step = context.training.global_batch_size
        self._routers: Routers = {}

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Take the texts apart.

        Returns: `tokens` and `attention_mask` int64[n, L], `parts`, `contents` and `sequence_rows` int64[n].
        """
        texts = TextParts.of(rows)
        arrays = {
            "tokens": texts.tokens,
            "attention_mask": texts.is_token.astype(np.int64),
            "parts": texts.parts,
            "contents": _contents(texts),
            "sequence_rows": texts.rows,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def first_pass(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        embeddings, router_sums = self._outputs(model, batch)
        return {
            "embeddings": embeddings,
            **router_sums,
            **{name: batch[name] for name in ("parts", "contents", "sequence_rows")},
        }

    def second_inputs(self, results: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """`gradients` float32[n, d], of all terms of the step, and the `terms` of the micro-batch's own queries."""
        groups = torch.cat([torch.zeros_like(result["parts"]) for result in results])
        found = self._compared(results, groups=groups)
        sizes = [len(result["parts"]) for result in results]
        pairs = zip(torch.split(found.gradients, sizes), torch.split(_columns(found), sizes), strict=True)
        return [{"gradients": gradients, "terms": terms.sum(dim=0)} for gradients, terms in pairs]

    def held_out(
        self,
        results: Sequence[Mapping[str, Tensor]],
        *,
        positions: Sequence[NDArray[np.int64]],
        parts: Sequence[str | None] = (),
    ) -> dict[str, WeightedSum]:
        """Compare held-out texts with those of as many rows as a step has, in their order."""
        groups = torch.cat(
            [
                torch.from_numpy(at // self._rows_per_step).to(result["parts"].device)[result["sequence_rows"]]
                for result, at in zip(results, positions, strict=True)
            ]
        )
        columns = _columns(self._compared(results, groups=groups)).double()
        terms = [one.sum(dim=0) for one in torch.split(columns, [len(result["parts"]) for result in results])]
        loss = self._summed(results, terms)
        found = {"loss": loss, **loss.metrics}
        for part in dict.fromkeys(parts):
            own = [number for number, name in enumerate(parts) if name == part]
            found[f"loss/{part}"] = self._summed([results[i] for i in own], [terms[i] for i in own])
        return found

    def _summed(self, results: Sequence[Mapping[str, Tensor]], terms: Sequence[Tensor]) -> WeightedSum:
        """The loss and the metrics of some held-out micro-batches."""
        count, total = sum(_num_queries(result) for result in results), torch.stack(list(terms)).sum(dim=0)
        sums = {name: torch.stack([result[name] for result in results]).sum() for name in self._routers}
        loss = WeightedSum(sum=total[0], weight=count, metrics=_metrics(total, count=count))
        return with_router_losses(loss, routers=self._routers, sums=sums)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The terms of the batch's queries, with the gradient of all terms of the step through its texts."""
        embeddings, router_sums = self._outputs(model, batch)
        if "gradients" not in batch:  # it is the only micro-batch
            own = {"embeddings": embeddings.detach(), "parts": batch["parts"], "contents": batch["contents"]}
            batch = {**batch, **self.second_inputs([own])[0]}
        through = (embeddings * batch["gradients"]).sum()
        count, terms = _num_queries(batch), batch["terms"]
        total = through + (terms[0] - through).detach()
        loss = WeightedSum(sum=total, weight=count, metrics=_metrics(terms, count=count))
        return with_router_losses(loss, routers=self._routers, sums=router_sums)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}

    def _compared(self, results: Sequence[Mapping[str, Tensor]], *, groups: Tensor) -> InBatchLoss:
        embeddings, parts, contents = (
            torch.cat([result[name] for result in results]) for name in ("embeddings", "parts", "contents")
        )
        own = Texts(embeddings=embeddings, parts=parts, contents=contents, groups=groups)
        return in_batch_loss(own, spec=self._spec)

    def _outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The embeddings float32[n, d], of length 1 if they are compared by cosine; and the sum of each loss of
        routers over the queries, each with its texts."""
        mask, self._routers = batch["attention_mask"], router_losses_of(model)
        out = model(input_ids=batch["tokens"], attention_mask=mask)
        pooled = pool(out.last_hidden_state, mask=mask, pooling=self._spec.pooling)
        embeddings = F.normalize(pooled, dim=1) if self._spec.similarity == "cosine" else pooled
        if not self._routers:
            return embeddings, {}
        query_of = (batch["parts"] == 1).cumsum(dim=0)
        groups = [
            torch.nonzero((mask * (query_of == number)[:, None]).flatten()).flatten()
            for number in range(1, _num_queries(batch) + 1)
        ]
        return embeddings, position_sums(self._routers, out.router_logits, groups)


def pool(hidden: Tensor, *, mask: Tensor, pooling: str) -> Tensor:
    """Make one vector of each sequence, which is padded at its end.

    Shapes: hidden: [n, L, d]; mask: int64[n, L], 0 at padding. Returns: float32[n, d].
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    lengths = mask.sum(dim=1, keepdim=True)
    if pooling == "last_token":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths[:, 0] - 1].float()
    return (hidden.float() * mask[:, :, None]).sum(dim=1) / lengths


def _num_queries(batch: Mapping[str, Tensor]) -> int:
    return int((batch["parts"] == 1).sum())


def _columns(found: InBatchLoss) -> Tensor:
    """float32[n, 3]: loss, hit and reciprocal rank of each query."""
    return torch.stack([found.losses, found.hits, found.reciprocal_ranks], dim=1)


def _metrics(terms: Tensor, *, count: int) -> dict[str, WeightedSum]:
    return {
        "accuracy": WeightedSum(sum=terms[1], weight=count),
        "mrr": WeightedSum(sum=terms[2], weight=count),
    }


def _contents(texts: TextParts) -> NDArray[np.int64]:
    """A number for the tokens of each text. Shapes: int64[n]."""
    digests = [
        hashlib.blake2b(np.ascontiguousarray(ids[kept]).tobytes(), digest_size=8).digest()
        for ids, kept in zip(texts.tokens, texts.is_token, strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype=np.int64).copy()
