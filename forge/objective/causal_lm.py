"""The summed cross entropy of the next token.

Where examples share a row, each sees only itself: transformers finds the examples in `position_ids`, which restart
at each of them, and builds a block-diagonal causal mask, or under flash attention the lengths of the examples
(which needs all rows in one).
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.model.isolation import require_isolation
from forge.model.router_loss import AUXILIARY, router_losses_of
from forge.objective.base import IGNORED, Arrays, WeightedSum
from forge.objective.cross_entropy import chunked_head_forward
from forge.objective.registry import OBJECTIVES, Direction
from forge.objective.router import Routers, perplexity, with_router_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forward:
    """The outputs of a forward pass that enter the loss."""

    cross_entropy: Tensor
    """Summed over the targets."""
    router_logits: Sequence[Tensor] = ()
    """Of each layer with experts, float[B·T, E]."""


class CausalLm:
    """Next-token prediction by transformers causal LMs, or modules whose `forward(input_ids)` returns logits."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["causal-lm"].metrics

    def __init__(self) -> None:
        self._is_chunked = False
        self._routers: Routers = {}

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
        if "segment_ids" in rows and not rows["segment_ids"].all():
            chosen["segment_ids"] = rows["segment_ids"]  # 0 at padding
        return {name: torch.from_numpy(array) for name, array in chosen.items()}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The cross entropy and, of a mixture of experts with `output_router_logits`, its auxiliary loss.

        Shapes: tokens, targets, position_ids, segment_ids: int64[B, T], targets[b, t] following tokens[b, t].
        """
        self._routers = router_losses_of(model)
        found = self._forward(model, batch)
        loss = WeightedSum(sum=found.cross_entropy, weight=(batch["targets"] != IGNORED).sum())
        sums = auxiliary_sums(self._routers, found.router_logits, batch)
        return with_router_losses(loss, routers=self._routers, sums=sums)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The perplexity: `exp` of the cross entropy, infinite where that overflows."""
        return {"perplexity": perplexity(means, routers=self._routers)}

    def _forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> _Forward:
        inputs = {"input_ids": batch["tokens"]}
        targets = batch["targets"]
        if "position_ids" in batch:
            require_isolation(model)
            inputs["position_ids"] = batch["position_ids"]
            if is_flash(model):
                inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
                targets = targets.reshape(1, -1)
        if not isinstance(model, PreTrainedModel):
            logits = model(**inputs).flatten(0, 1).float()
            flat = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
            return _Forward(cross_entropy=flat)
        options: dict[str, Any] = {"use_cache": False}
        if self._routers:
            options["output_router_logits"] = True
        if not self._is_chunked:
            out = model(**inputs, labels=targets, shift_labels=targets, num_items_in_batch=1, **options)
            if not self._routers:
                return _Forward(cross_entropy=out.loss)
            # Without what transformers has added, for all rows together.
            plain = out.loss - self._routers[AUXILIARY].coefficient * out.aux_loss
            return _Forward(cross_entropy=plain, router_logits=out.router_logits)
        out = model.base_model(**inputs, **options)
        # Through the head's own __call__, so that ZeRO 3 gathers its weight.
        summed = model.get_output_embeddings()(out.last_hidden_state, targets=targets)
        return _Forward(cross_entropy=summed, router_logits=getattr(out, "router_logits", None) or ())


def auxiliary_sums(routers: Routers, logits: Sequence[Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The losses of routers of the rows of a batch, each as often as it has targets."""
    weights = (batch["targets"] != IGNORED).sum(dim=1)
    is_token = batch["segment_ids"] > 0 if "segment_ids" in batch else None
    return {name: router.row_sum(logits, weights=weights, is_token=is_token) for name, router in routers.items()}


def is_flash(model: nn.Module) -> bool:
    """Whether a model uses flash attention, which takes packed examples only in a single row."""
    config = getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", "")).startswith("flash")
