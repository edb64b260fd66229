"""Metrics of retrieval: mean reciprocal rank, recall and NDCG of the first k texts.

They are computed of the ranks of the texts that belong to a query. `ranks_of` finds them; of equal scores the texts
that do not belong come first, so that a model which gives everything the same score is not rewarded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from forge.errors import DataError
from forge.evaluate.metrics.base import Floats, ScoredExample, dense, ratio
from forge.objective.registry import Direction


def ranks_of(scores: NDArray[np.floating], *, relevant: Sequence[int]) -> tuple[int, ...]:
    """The ranks, from 1, of some candidates by their scores; NaN is the worst score.

    Args:
        scores: of every candidate, larger is nearer. Shapes: float[C].
        relevant: their numbers.
    """
    values = np.where(np.isnan(scores), -np.inf, scores)
    own = values[list(relevant)]
    others = np.sort(np.delete(values, list(relevant)))
    before = len(others) - np.searchsorted(others, own, side="left")
    order = np.lexsort((np.arange(len(own)), -own))
    among = np.empty(len(own), dtype=np.int64)
    among[order] = np.arange(1, len(own) + 1)
    return tuple(int(rank) for rank in before + among)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """`mrr`, `recall_at_k` or `ndcg` at one or several k."""

    name: str
    ranks: tuple[int, ...]

    @property
    def directions(self) -> Mapping[str, Direction]:
        return dict.fromkeys(map(self._named, self.ranks), "max")

    @property
    def of_examples(self) -> tuple[str, ...]:
        return tuple(self.directions)

    @property
    def signature(self) -> str:
        return f"{self.name}|ties:last" + ("|gain:linear" if self.name == "ndcg" else "")

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return dense(map(self._row, examples), width=len(self.ranks) + 1)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        return {self._named(k): ratio(sums[:, at], sums[:, -1]) for at, k in enumerate(self.ranks)}

    def _row(self, example: ScoredExample) -> list[float]:
        if not example.ranks or len(example.gains) not in (0, len(example.ranks)):
            raise DataError("a query needs the ranks of the texts that belong to it, and as many gains or none")
        score = {"mrr": reciprocal_rank, "recall_at_k": recall_at, "ndcg": ndcg_at}[self.name]
        return [*(score(example, k=k) for k in self.ranks), 1.0]

    def _named(self, k: int) -> str:
        if self.name == "mrr":
            return "mrr" if k == 1_000_000 else f"mrr@{k}"
        return f"{'recall' if self.name == 'recall_at_k' else self.name}@{k}"


def reciprocal_rank(example: ScoredExample, *, k: int) -> float:
    """1 / the best rank, 0 beyond k."""
    best = min(example.ranks)
    return 1 / best if best <= k else 0.0


def recall_at(example: ScoredExample, *, k: int) -> float:
    """The share of the texts that belong to the query that is in the first k."""
    return sum(rank <= k for rank in example.ranks) / len(example.ranks)


def ndcg_at(example: ScoredExample, *, k: int) -> float:
    """Σ gain / log₂(rank + 1) of the first k, by the largest possible; linear gains, as scikit-learn."""
    gains = example.gains or (1.0,) * len(example.ranks)
    found = sum(gain / np.log2(rank + 1) for rank, gain in zip(example.ranks, gains, strict=True) if rank <= k)
    best = sum(gain / np.log2(rank + 1) for rank, gain in enumerate(sorted(gains, reverse=True)[:k], start=1))
    return float(found / best) if best > 0 else 0.0
