"""The summed cross entropy of masked tokens.

Which positions are masked is drawn from a number for each row, so it is the same at every world size, and other in
every step. Only the masked positions reach the head of the model: of 15 % of the tokens, 15 % of the logits.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", arXiv 1810.04805, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from forge.config.training import MaskingSpec
from forge.model.position_wise import selected_positions
from forge.objective.base import IGNORED, Arrays, ObjectiveContext, WeightedSum
from forge.objective.examples import sequence_seeds, sequences_of
from forge.objective.masking import TokenKinds, draw_masks
from forge.objective.registry import OBJECTIVES, Direction


class MaskedLm:
    """Masked-token prediction by transformers encoders."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["masked-lm"].metrics

    def __init__(self, *, context: ObjectiveContext) -> None:
        self._spec: MaskingSpec = context.training.masking
        self._kinds = TokenKinds.of(context.tokenizer)
        self._is_selecting = context.has_positionwise_head

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Mask tokens.

        Returns: `tokens` int64[n, L] with masks, `targets` int64[n, L], -100 where nothing was masked,
            `attention_mask` int64[n, L] if there is padding, and `sequence_rows`.
        """
        sequences = sequences_of(rows)
        is_filler = (rows["targets"] == IGNORED).all(axis=1)
        masked, targets = draw_masks(
            sequences.arrays["tokens"],
            is_token=sequences.is_token & ~is_filler[sequences.rows][:, None],
            seeds=sequence_seeds(rows["row_seeds"], sequences.rows),
            spec=self._spec,
            kinds=self._kinds,
        )
        chosen: dict[str, NDArray[Any]] = {"tokens": masked, "targets": targets}
        if "segment_ids" in rows:
            chosen["sequence_rows"] = sequences.rows
        if not sequences.is_token.all():
            chosen["attention_mask"] = sequences.is_token.astype(np.int64)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in chosen.items()}

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        """The number of masked tokens."""
        return float((batch["targets"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The cross entropy of the masked tokens, and how many of them are predicted as the likeliest."""
        targets = batch["targets"].flatten()
        where = torch.nonzero(targets != IGNORED).flatten()
        count = len(where)
        if not count:  # the model runs all the same, as ranks must run it together
            where = where.new_zeros(1)
        logits = self._logits(model, batch, where=where).float()
        goals = targets[where]
        total = F.cross_entropy(logits, goals, ignore_index=IGNORED, reduction="sum")
        hits = (logits.argmax(dim=-1) == goals).sum()
        return WeightedSum(sum=total, weight=count, metrics={"accuracy": WeightedSum(sum=hits, weight=count)})

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The perplexity of the masked tokens: `exp` of the loss, infinite where that overflows."""
        return {"perplexity": math.exp(means["loss"]) if means["loss"] < 700 else math.inf}

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor], *, where: Tensor) -> Tensor:
        """Logits float[k, V] of the flat positions `where`."""
        inputs = {"input_ids": batch["tokens"]}
        if "attention_mask" in batch:
            inputs["attention_mask"] = batch["attention_mask"]
        if not self._is_selecting:
            logits: Tensor = model(**inputs).logits.flatten(0, 1)[where]
            return logits
        with selected_positions(model, where):
            chosen: Tensor = model(**inputs).logits.flatten(0, 1)
        return chosen
