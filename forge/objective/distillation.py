"""The next token, as the text has it and as a teacher predicts it.

The teacher is no part of the trained module: it is in no snapshot and no checkpoint, and gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.config.distillation import DistillationSpec
from forge.errors import RunError
from forge.model.isolation import require_isolation
from forge.model.router_loss import router_losses_of
from forge.objective.base import IGNORED, Arrays, ObjectiveContext, WeightedSum
from forge.objective.causal_lm import CausalLm, auxiliary_sums, is_flash
from forge.objective.divergence import forward_divergence, stored_divergence
from forge.objective.registry import OBJECTIVES, Direction
from forge.objective.router import with_router_losses

TEACHER_TOKENS = "teacher_tokens"
"""The array with the tokens that the teacher finds most probable at a target, in descending order; 0 elsewhere."""
TEACHER_LOG_PROBS = "teacher_log_probs"
"""The array with their log-probabilities at the temperature of the job."""


class Distillation:
    """Next-token prediction mixed with the forward divergence from a teacher with the same vocabulary."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["distillation"].metrics

    def __init__(self, *, context: ObjectiveContext) -> None:
        self._spec: DistillationSpec = context.training.distillation
        self._teacher = context.teacher
        self._vocab_size = context.vocab_size
        self._rows = CausalLm()

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Convert rows; of stored outputs of the teacher those at the targets, [k, top_k]."""
        batch = self._rows.batch(rows)
        if self._spec.teacher_logits == "live":
            return batch
        where = rows["targets"].reshape(-1) != IGNORED
        for name in (TEACHER_TOKENS, TEACHER_LOG_PROBS):
            if name not in rows:
                raise RunError("the prepared data have no outputs of the teacher; prepare them again")
            batch[name] = torch.from_numpy(rows[name].reshape(-1, rows[name].shape[-1])[where])
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The mix of both terms at every target."""
        routers = router_losses_of(model)
        where = torch.nonzero(batch["targets"].flatten() != IGNORED).flatten()
        goals, count = batch["targets"].flatten()[where], len(where)
        outputs = model_outputs(model, batch, with_router=bool(routers))
        logits = outputs.logits[where]
        spec = self._spec
        compared = (
            self._stored(logits, batch) if TEACHER_TOKENS in batch else self._live(logits, batch, where=where)
        )
        apart, agreed = compared
        entropy = F.cross_entropy(logits.float(), goals, reduction="sum")
        sums = {"cross_entropy": entropy.detach(), "divergence": apart.detach(), "agreement": agreed}
        loss = WeightedSum(
            sum=spec.weight * apart + (1 - spec.weight) * entropy,
            weight=count,
            metrics={name: WeightedSum(sum=value, weight=count) for name, value in sums.items()},
        )
        router_sums = auxiliary_sums(routers, outputs.router_logits, batch)
        return with_router_losses(loss, routers=routers, sums=router_sums)

    def _live(self, logits: Tensor, batch: Mapping[str, Tensor], *, where: Tensor) -> tuple[Tensor, Tensor]:
        """The summed divergence from the teacher's logits, and how often both find the same token likeliest."""
        if self._teacher is None:
            raise RunError("objective: distillation has no teacher")
        with torch.no_grad():
            taught = model_outputs(self._teacher, batch).logits[where]
        size = min(logits.shape[1], taught.shape[1], self._vocab_size or logits.shape[1])
        own, taught = logits[:, :size], taught[:, :size]
        apart = forward_divergence(own, taught, temperature=self._spec.temperature, top_k=self._spec.top_k)
        return apart.sum(), (own.argmax(dim=1) == taught.argmax(dim=1)).sum()

    def _stored(self, logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same of the teacher's stored outputs."""
        own, tokens = logits[:, : self._vocab_size], batch[TEACHER_TOKENS]
        apart = stored_divergence(
            own, tokens=tokens, log_probs=batch[TEACHER_LOG_PROBS], temperature=self._spec.temperature
        )
        return apart.sum(), (own.argmax(dim=1) == tokens[:, 0]).sum()

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The perplexity of the text: `exp` of its cross entropy, infinite where that overflows."""
        entropy = means["cross_entropy"]
        return {"perplexity": math.exp(entropy) if entropy < 700 else math.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalOutputs:
    """Of a forward pass: logits [B·T, V], and those of the routers of each layer with experts."""

    logits: Tensor
    router_logits: Sequence[Tensor] = ()


def model_outputs(model: nn.Module, batch: Mapping[str, Tensor], *, with_router: bool = False) -> CausalOutputs:
    """Run a causal language model on the rows of a batch."""
    inputs = {"input_ids": batch["tokens"]}
    if "position_ids" in batch:
        require_isolation(model)
        inputs["position_ids"] = batch["position_ids"]
        if is_flash(model):
            inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
    if not isinstance(model, PreTrainedModel):
        return CausalOutputs(logits=model(**inputs).flatten(0, 1))
    options: dict[str, Any] = {"output_router_logits": True} if with_router else {}
    out: Any = model(**inputs, use_cache=False, **options)
    return CausalOutputs(logits=out.logits.flatten(0, 1), router_logits=out.router_logits if with_router else ())
