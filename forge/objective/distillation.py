"""The next token, as the text has it and as a teacher predicts it.

The teacher is no part of the trained module: it is in no snapshot and no checkpoint, and gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.config.distillation import DistillationSpec
from forge.errors import RunError
from forge.model.isolation import require_isolation
from forge.objective.base import IGNORED, Arrays, ObjectiveContext, WeightedSum
from forge.objective.causal_lm import CausalLm, is_flash
from forge.objective.divergence import forward_divergence
from forge.objective.registry import OBJECTIVES, Direction


class Distillation:
    """Next-token prediction mixed with the forward divergence from a teacher with the same vocabulary."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["distillation"].metrics

    def __init__(self, *, context: ObjectiveContext) -> None:
        self._spec: DistillationSpec = context.training.distillation
        self._teacher = context.teacher
        self._vocab_size = context.vocab_size
        self._rows = CausalLm()

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        return self._rows.batch(rows)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The mix of both terms at every target."""
        if self._teacher is None:
            raise RunError("objective: distillation has no teacher")
        where = torch.nonzero(batch["targets"].flatten() != IGNORED).flatten()
        goals, count = batch["targets"].flatten()[where], len(where)
        logits = _logits(model, batch)[where]
        with torch.no_grad():
            taught = _logits(self._teacher, batch)[where]
        size = min(logits.shape[1], taught.shape[1], self._vocab_size or logits.shape[1])
        spec = self._spec
        apart = forward_divergence(
            logits[:, :size], taught[:, :size], temperature=spec.temperature, top_k=spec.top_k
        ).sum()
        entropy = F.cross_entropy(logits.float(), goals, reduction="sum")
        agreed = (logits[:, :size].argmax(dim=1) == taught[:, :size].argmax(dim=1)).sum()
        sums = {"cross_entropy": entropy.detach(), "divergence": apart.detach(), "agreement": agreed}
        return WeightedSum(
            sum=spec.weight * apart + (1 - spec.weight) * entropy,
            weight=count,
            metrics={name: WeightedSum(sum=value, weight=count) for name, value in sums.items()},
        )

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The perplexity of the text: `exp` of its cross entropy, infinite where that overflows."""
        entropy = means["cross_entropy"]
        return {"perplexity": math.exp(entropy) if entropy < 700 else math.inf}


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [B·T, V]."""
    inputs = {"input_ids": batch["tokens"]}
    if "position_ids" in batch:
        require_isolation(model)
        inputs["position_ids"] = batch["position_ids"]
        if is_flash(model):
            inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
    if not isinstance(model, PreTrainedModel):
        found: Tensor = model(**inputs)
        return found.flatten(0, 1)
    out: Any = model(**inputs, use_cache=False)
    logits: Tensor = out.logits
    return logits.flatten(0, 1)
