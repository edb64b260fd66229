"""The summed cross entropy of the tokens of targets, given their sources, by an encoder-decoder.

The pairs of a packed row are taken apart. The model itself says what its decoder reads for given labels: they are
shifted to the right behind a first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from forge.data.formats.pair import SOURCE, TARGET
from forge.errors import RunError
from forge.model.router_loss import router_losses_of
from forge.model.seq2seq import seq2seq_output
from forge.objective.base import IGNORED, Arrays, WeightedSum
from forge.objective.examples import sequences_of
from forge.objective.registry import OBJECTIVES, Direction
from forge.objective.router import Routers, perplexity, with_router_losses


class Seq2Seq:
    """Translation, summaries and whatever else maps a text to a text, by transformers' encoder-decoders."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["seq2seq"].metrics

    def __init__(self) -> None:
        self._routers: Routers = {}

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Take pairs apart.

        Returns: `source` int64[n, S], `attention_mask` int64[n, S], `labels` int64[n, T], -100 at padding, and
            `sequence_rows` int64[n].
        """
        if "part" not in rows:
            raise RunError(
                f"seq2seq needs examples with an array 'part', {SOURCE} in the source, {TARGET} in the target"
            )
        pairs = sequences_of(rows)
        source, mask = _part(pairs.arrays, SOURCE, name="tokens", padding=0)
        labels, _ = _part(pairs.arrays, TARGET, name="targets", padding=IGNORED)
        mask[:, :1] = True  # attention over nothing has no softmax
        return tensors(source=source, is_token=mask, labels=labels, sequence_rows=pairs.rows)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The cross entropy of the labels, and how many of them are predicted as the likeliest."""
        labels, mask = batch["labels"], batch["attention_mask"]
        self._routers = router_losses_of(model)
        options = {"output_router_logits": True} if self._routers else {}
        out = seq2seq_output(model, source=batch["source"], labels=labels, attention_mask=mask, **options)
        logits = out.logits
        goals = labels.flatten()
        where = torch.nonzero(goals != IGNORED).flatten()
        chosen, goals = logits.flatten(0, 1)[where].float(), goals[where]
        total = F.cross_entropy(chosen, goals, reduction="sum")
        hits = (chosen.argmax(dim=-1) == goals).sum()
        weight = len(where)
        loss = WeightedSum(sum=total, weight=weight, metrics={"accuracy": WeightedSum(sum=hits, weight=weight)})
        is_label = labels != IGNORED
        weights = is_label.sum(dim=1)
        sums = {
            name: router.row_sum(out.encoder_router_logits, weights=weights, is_token=mask > 0)
            + router.row_sum(out.decoder_router_logits, weights=weights, is_token=is_label)
            for name, router in self._routers.items()
        }
        return with_router_losses(loss, routers=self._routers, sums=sums)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The perplexity of the targets: `exp` of the cross entropy, infinite where that overflows."""
        return {"perplexity": perplexity(means, routers=self._routers)}


def tensors(
    *,
    source: NDArray[np.int64],
    is_token: NDArray[np.bool_],
    labels: NDArray[np.int64],
    sequence_rows: NDArray[np.int64] | None,
) -> dict[str, Tensor]:
    """Return a batch of pairs as `Seq2Seq.loss` takes it.

    Args:
        sequence_rows: of examples; None if every sequence is a row, and all are equally long.
    """
    arrays: dict[str, NDArray[Any]] = {
        "source": source,
        "attention_mask": is_token.astype(np.int64),
        "labels": labels,
    }
    if sequence_rows is not None:
        arrays["sequence_rows"] = sequence_rows
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _part(arrays: Arrays, part: int, *, name: str, padding: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Move the values of one part of each sequence to its beginning. Returns: them, and where no padding is.

    Shapes: int64[n, L'] and bool[n, L'], L' the longest part, at least 1.
    """
    is_part = arrays["part"] == part
    lengths = is_part.sum(axis=1)
    inside = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
    found = np.full(inside.shape, padding, dtype=np.int64)
    found[inside] = arrays[name][is_part]
    return found, inside
