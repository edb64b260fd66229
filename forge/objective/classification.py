"""Labels or numbers for texts and their words, by the classifiers of transformers.

The losses are those of transformers: cross entropy, binary cross entropy averaged over the labels, and the squared
error. The F1 score is no mean over rows, so the counts of each label are added up over all rows first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from forge.data.label_bits import bits_of
from forge.model.router_loss import recorded_router_logits, router_losses_of
from forge.objective.base import IGNORED, Arrays, ObjectiveContext, WeightedSum
from forge.objective.class_weights import weights_of
from forge.objective.examples import sequences_of
from forge.objective.registry import OBJECTIVES, Direction
from forge.objective.router import with_router_losses

_F1, _ERRORS = "labels", "errors"
_MAX_F1_LABELS = 2000
"""The F1 score of more labels is not computed: their counts are added up over the ranks at every step."""


class Classification:
    """One label, several labels, or a number for a text; or a label for each word."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["classification"].metrics

    def __init__(self, *, context: ObjectiveContext) -> None:
        assert context.labels is not None, "the format `labelled` finds the labels"
        spec = context.training.classification
        self._kind = spec.kind
        self._num_labels = len(context.labels.names) or 1
        weights = weights_of(spec, context.labels)
        self._weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        if self._weights is not None and self._kind != "multi":
            self.weight = self._weight_of  # what the format gives is their number

    @property
    def count_sizes(self) -> Mapping[str, int]:
        if self._kind == "regression":
            return {_ERRORS: 4}
        return {_F1: 3 * self._num_labels} if self._num_labels <= _MAX_F1_LABELS else {}

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Take the examples apart.

        Returns: `tokens` int64[n, L]; `attention_mask` int64[n, L] if there is padding; `token_types` int64[n, L]
            of pairs; `sequence_rows`; and `goals`: int64[n] or, of words, int64[n, L], -100 where there is none; of
            several labels float[n, K], each 0 or 1, and of numbers float[n], both with `has_goal` bool[n].
        """
        sequences = sequences_of(rows)
        arrays, targets = sequences.arrays, sequences.arrays["targets"]
        found: dict[str, NDArray[Any]] = {"tokens": arrays["tokens"], "sequence_rows": sequences.rows}
        if not sequences.is_token.all():
            found["attention_mask"] = sequences.is_token.astype(np.int64)
        if "part" in arrays:
            found["token_types"] = np.maximum(arrays["part"] - 1, 0)
        at = (targets != IGNORED).argmax(axis=1)
        each = np.arange(len(targets))
        if self._kind == "token":
            found["goals"] = targets
        elif self._kind == "single":
            found["goals"] = targets[each, at]
        else:
            found["has_goal"] = targets[each, at] != IGNORED
            goals = arrays["values" if self._kind == "regression" else "label_bits"][each, at]
            goals = bits_of(goals, count=self._num_labels) if self._kind == "multi" else goals
            found["goals"] = goals.astype(np.float32)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The loss, with the counts that metrics are computed from."""
        routers = router_losses_of(model)
        with recorded_router_logits(model) as router_logits:
            logits = classifier_logits(model, batch).float()
        mask = batch.get("attention_mask")
        sums = {
            name: router.row_sum(
                router_logits,
                weights=self._row_weights(batch),
                is_token=None if mask is None else mask > 0,
            )
            for name, router in routers.items()
        }
        return with_router_losses(self._plain_loss(logits, batch), routers=routers, sums=sums)

    def _plain_loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> WeightedSum:
        if self._kind == "regression":
            return _squared_error(logits.squeeze(-1), batch["goals"], has_goal=batch["has_goal"])
        if self._kind == "multi":
            return self._binary(logits, batch["goals"], has_goal=batch["has_goal"])
        return self._cross_entropy(logits.flatten(0, -2), batch["goals"].flatten())

    def _row_weights(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The weight of each sequence in the loss, [n]."""
        if "has_goal" in batch:
            return batch["has_goal"].float()
        goals = batch["goals"].reshape(len(batch["goals"]), -1)
        weights = torch.ones(self._num_labels) if self._weights is None else self._weights
        return (weights.to(goals.device)[goals.clamp(min=0)] * (goals != IGNORED)).sum(dim=1)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}

    def metrics_of(self, counts: Mapping[str, Tensor]) -> Mapping[str, float]:
        """The F1 score, a mean over the labels that occur or are predicted; of numbers the coefficient of
        determination."""
        if _ERRORS in counts:
            number, total, squares, error = counts[_ERRORS].tolist()
            variance = squares - total**2 / number if number else 0.0
            return {"mse": error / number, "r2": 1 - error / variance} if variance > 0 else {}
        if _F1 not in counts:
            return {}
        hits, predicted, actual = counts[_F1].view(3, -1)
        occurring = predicted + actual > 0
        scores = 2 * hits[occurring] / (predicted + actual)[occurring]
        return {"f1": float(scores.mean())} if len(scores) else {}

    def _weight_of(self, batch: Mapping[str, Tensor]) -> float:
        """The weights of the labels of a batch."""
        assert self._weights is not None
        goals = batch["goals"]
        return float(self._weights[goals[goals != IGNORED]].double().sum())

    def _cross_entropy(self, logits: Tensor, goals: Tensor) -> WeightedSum:
        weights = None if self._weights is None else self._weights.to(logits.device)
        total = F.cross_entropy(logits, goals, weight=weights, ignore_index=IGNORED, reduction="sum")
        is_goal = goals != IGNORED
        actual, predicted = goals[is_goal], logits.detach().argmax(dim=-1)[is_goal]
        hits, count = actual[predicted == actual], len(actual)
        weight = count if weights is None else float(weights[actual].double().sum())
        return WeightedSum(
            sum=total,
            weight=weight,
            metrics={"accuracy": WeightedSum(sum=total.new_tensor(float(len(hits))), weight=count)},
            counts=self._counts(hits, predicted, actual),
        )

    def _binary(self, logits: Tensor, goals: Tensor, *, has_goal: Tensor) -> WeightedSum:
        weights = None if self._weights is None else self._weights.to(logits.device)
        losses = F.binary_cross_entropy_with_logits(logits, goals, pos_weight=weights, reduction="none")
        count = int(has_goal.sum())
        predicted, actual = (logits.detach() > 0)[has_goal], (goals > 0.5)[has_goal]
        right = (predicted == actual).all(dim=-1).sum()
        found = (table.nonzero()[:, 1] for table in (predicted & actual, predicted, actual))
        return WeightedSum(
            sum=(losses.mean(dim=-1) * has_goal).sum(),
            weight=count,
            metrics={"accuracy": WeightedSum(sum=right, weight=count)},
            counts=self._counts(*found),
        )

    def _counts(self, hits: Tensor, predicted: Tensor, actual: Tensor) -> dict[str, Tensor]:
        """How often each label is predicted rightly, is predicted, and occurs."""
        if _F1 not in self.count_sizes:
            return {}
        size = self._num_labels
        return {_F1: torch.cat([torch.bincount(one, minlength=size) for one in (hits, predicted, actual)])}


def _squared_error(found: Tensor, goals: Tensor, *, has_goal: Tensor) -> WeightedSum:
    error = ((found - goals) ** 2 * has_goal).sum()
    given = goals[has_goal].double()
    sums = [given.new_tensor(len(given)), given.sum(), (given**2).sum(), error.detach().double()]
    return WeightedSum(sum=error, weight=len(given), counts={_ERRORS: torch.stack(sums)})


def classifier_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of every sequence, or of every token; padding is the token that the model knows as such."""
    tokens, config = batch["tokens"], model.config
    inputs = {"input_ids": tokens}
    if "attention_mask" in batch:
        mask, pad_id = batch["attention_mask"], config.get_text_config().pad_token_id  # type: ignore[union-attr, operator]
        inputs = {"input_ids": tokens.masked_fill(mask == 0, pad_id or 0), "attention_mask": mask}
    if "token_types" in batch and (getattr(config, "type_vocab_size", None) or 0) > 1:
        inputs["token_type_ids"] = batch["token_types"]
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False  # type: ignore[assignment]
    logits: Tensor = model(**inputs).logits
    return logits
