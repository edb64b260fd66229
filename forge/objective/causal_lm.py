"""The summed cross entropy of the next token.

Where examples share a row, each sees only itself: transformers finds the examples in `position_ids`, which restart
at each of them, and builds a block-diagonal causal mask, or under flash attention the lengths of the examples
(which needs all rows in one).
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.model.isolation import require_isolation
from forge.objective.base import IGNORED, Arrays, WeightedSum
from forge.objective.cross_entropy import chunked_head_forward
from forge.objective.registry import OBJECTIVES, Direction


class CausalLm:
    """Next-token prediction by transformers causal LMs, or modules whose `forward(input_ids)` returns logits."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["causal-lm"].metrics

    def __init__(self) -> None:
        self._is_chunked = False

    def use_chunks(self, model: nn.Module) -> None:
        """Compute the loss in chunks from here on; the logits must be a linear map of the last hidden state."""
        assert isinstance(model, PreTrainedModel), "only a transformers model is known to have a linear head"
        head: Any = model.get_output_embeddings()
        head.forward = types.MethodType(chunked_head_forward, head)
        self._is_chunked = True

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        chosen = {"tokens": rows["tokens"], "targets": rows["targets"]}
        if "segment_ids" in rows and rows["segment_ids"].max(initial=0) > 1:
            chosen["position_ids"] = rows["position_ids"]
        return {name: torch.from_numpy(array) for name, array in chosen.items()}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """Shapes: tokens, targets, position_ids: int64[B, T], targets[b, t] following tokens[b, t]."""
        weight = (batch["targets"] != IGNORED).sum()
        return WeightedSum(sum=self._sum(model, batch), weight=weight)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The perplexity: `exp(loss)`, infinite where that overflows."""
        return {"perplexity": math.exp(means["loss"]) if means["loss"] < 700 else math.inf}

    def _sum(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch["tokens"]}
        targets = batch["targets"]
        if "position_ids" in batch:
            require_isolation(model)
            inputs["position_ids"] = batch["position_ids"]
            if _is_flash(model):
                inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
                targets = targets.reshape(1, -1)
        if not isinstance(model, PreTrainedModel):
            logits = model(**inputs).flatten(0, 1).float()
            return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        if not self._is_chunked:
            out = model(**inputs, labels=targets, shift_labels=targets, num_items_in_batch=1, use_cache=False)
            loss: Tensor = out.loss
            return loss
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        # Through the head's own __call__, so that ZeRO 3 gathers its weight.
        summed: Tensor = model.get_output_embeddings()(hidden, targets=targets)
        return summed


def _is_flash(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", "")).startswith("flash")
