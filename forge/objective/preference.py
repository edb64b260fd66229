"""Objectives on preference pairs: DPO and its relatives, which compare with a reference model, and ORPO.

A pair is one term of the loss. Where the model keeps examples apart, all sides of a row are one sequence with
positions that restart, so nothing is padding; elsewhere each side is a padded sequence. The head sees the positions
of the answers alone.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.config.preference import DpoSpec
from forge.errors import RunError
from forge.model.adapters import adapters_disabled
from forge.model.router_loss import router_losses_of
from forge.objective.base import Arrays, ObjectiveContext, WeightedSum
from forge.objective.causal_lm import is_flash
from forge.objective.pair_losses import PAIR_LOSSES, LogRatios, log_odds_ratio
from forge.objective.pairs import REFERENCE_LOG_PROBS, PairRows
from forge.objective.registry import OBJECTIVES, Direction
from forge.objective.router import Routers, position_sums, with_router_losses
from forge.objective.token_log_probs import log_prob_head_forward, log_probs_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOutputs:
    """What a model says about pairs."""

    log_probs: Tensor
    """Sums of the answers, float32[p, 2]: chosen and rejected; a graph to the model even without any."""
    routers: Routers
    auxiliary: Mapping[str, Tensor]
    """The sum of each loss of routers over pairs, each of both of its texts together."""


class PairLogProbs:
    """The log-probabilities of answers under a causal language model."""

    def __init__(self, *, keeps_examples_apart: bool) -> None:
        self._is_packed = keeps_examples_apart
        self._is_chunked = False

    def use_chunks(self, model: nn.Module) -> None:
        """Compute logits in chunks from here on; they must be a linear map of the last hidden state."""
        assert isinstance(model, PreTrainedModel), "only a transformers model is known to have a linear head"
        head: Any = model.get_output_embeddings()
        head.forward = types.MethodType(log_prob_head_forward, head)
        self._is_chunked = True

    def batch(self, pairs: PairRows) -> dict[str, Tensor]:
        """Convert rows: what the model is given, `where` and `targets` int64[k], the `sides` of these, and
        `texts` int64[s, 2], the flat positions at which each side begins and ends."""
        arrays = pairs.packed() if self._is_packed else pairs.separated()
        arrays |= {"targets": pairs.targets(), "sides": pairs.sides, "lengths": pairs.num_targets()}
        arrays["texts"] = pairs.texts(is_packed=self._is_packed)
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}

    def tokens(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities of the targets, float32[k]. The model runs even if there are none, as ranks must run it
        together; the result is then one value times 0."""
        return self._tokens(model, batch, options={})[0]

    def sides(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """`PairOutputs.log_probs`."""
        return _side_sums(self.tokens(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> PairOutputs:
        """Run the model that is trained."""
        routers = router_losses_of(model)
        found, out = self._tokens(model, batch, options={"output_router_logits": True} if routers else {})
        auxiliary = {}
        if routers:
            pairs = batch["texts"].reshape(-1, 4).tolist()
            own = [torch.cat([torch.arange(a, b), torch.arange(c, d)]).to(found.device) for a, b, c, d in pairs]
            auxiliary = position_sums(routers, out.router_logits, own)
        return PairOutputs(log_probs=_side_sums(found, batch), routers=routers, auxiliary=auxiliary)

    def _tokens(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """The log-probabilities, and the output of the model."""
        where, targets = batch["where"], batch["targets"]
        is_filler = not len(where)
        if is_filler:
            where, targets = where.new_zeros(1), targets.new_zeros(1)
        inputs = {"input_ids": batch["tokens"]}
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"]
            if is_flash(model):
                inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
        elif isinstance(model, PreTrainedModel):
            inputs["attention_mask"] = batch["attention_mask"]
        out: Any = None
        if not isinstance(model, PreTrainedModel):
            found = log_probs_of(model(**inputs).flatten(0, 1)[where], targets)
        elif not self._is_chunked:
            out = model(**inputs, use_cache=False, **options)
            found = log_probs_of(out.logits.flatten(0, 1)[where], targets)
        else:
            out = model.base_model(**inputs, use_cache=False, **options)
            # Through the head's own __call__, so that ZeRO 3 gathers its weight.
            found = model.get_output_embeddings()(out.last_hidden_state.flatten(0, 1)[where], tokens=targets)
        return (found * 0 if is_filler else found), out


def _side_sums(log_probs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    sums = log_probs.new_zeros(len(batch["lengths"]))
    if not len(batch["where"]):
        return sums.reshape(-1, 2) + log_probs.sum()
    return sums.index_add(0, batch["sides"], log_probs).reshape(-1, 2)


class _PairObjective:
    """What objectives on pairs share."""

    def __init__(self, *, context: ObjectiveContext) -> None:
        self._log_probs = PairLogProbs(keeps_examples_apart=context.keeps_examples_apart)

    def use_chunks(self, model: nn.Module) -> None:
        """Compute logits in chunks from here on."""
        self._log_probs.use_chunks(model)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}


class Dpo(_PairObjective):
    """Direct preference optimisation with any loss of `training.dpo.loss`."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["dpo"].metrics

    def __init__(self, *, context: ObjectiveContext) -> None:
        super().__init__(context=context)
        self._spec: DpoSpec = context.training.dpo
        self._loss = PAIR_LOSSES[context.training.pair_loss]
        self._reference = context.reference

    def use_chunks(self, model: nn.Module) -> None:
        super().use_chunks(model)
        if self._reference is not None:
            self._log_probs.use_chunks(self._reference)

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Convert rows of pairs; `reference` float32[p, 2] of those whose reference was computed beforehand."""
        pairs = PairRows.of(rows)
        batch = self._log_probs.batch(pairs)
        if self._spec.reference == "stored":
            if REFERENCE_LOG_PROBS not in rows:
                raise RunError(
                    "the prepared data have no log-probabilities of the reference model; prepare them again"
                )
            sums = pairs.sums(rows[REFERENCE_LOG_PROBS]).reshape(-1, 2)
            batch["reference"] = torch.from_numpy(sums.astype(np.float32))
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The loss of each pair, and its implicit rewards `β log(policy / reference)`."""
        reference = batch["reference"] if "reference" in batch else self._live(model, batch)
        found = self._log_probs.outputs(model, batch)
        ratios = found.log_probs - reference
        lengths = batch["lengths"].reshape(-1, 2).float()
        losses = self._loss(
            LogRatios(
                chosen=ratios[:, 0],
                rejected=ratios[:, 1],
                chosen_lengths=lengths[:, 0],
                rejected_lengths=lengths[:, 1],
            ),
            self._spec.beta,
            self._spec.label_smoothing,
        )
        summed = pair_sums(losses, rewards=self._spec.beta * ratios.detach())
        return with_router_losses(summed, routers=found.routers, sums=found.auxiliary)

    def _live(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the reference says: the model held beside, else the model itself without its adapters."""
        if self._reference is not None:
            with torch.no_grad():
                return self._log_probs.sides(self._reference, batch)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), adapters_disabled(model):
                return self._log_probs.sides(model, batch)
        finally:
            model.train(was_training)


class Orpo(_PairObjective):
    """Cross entropy of the chosen answer and the log odds ratio of the two; each pair counts once."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["orpo"].metrics

    def __init__(self, *, context: ObjectiveContext) -> None:
        super().__init__(context=context)
        self._beta = context.training.orpo.beta

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        return self._log_probs.batch(PairRows.of(rows))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """`-log p(chosen) / n - β log σ(log odds ratio)` of each pair, of means per token."""
        outputs = self._log_probs.outputs(model, batch)
        means = outputs.log_probs / batch["lengths"].reshape(-1, 2)
        log_odds = log_odds_ratio(means[:, 0], means[:, 1])
        cross_entropy = -means[:, 0]
        losses = cross_entropy - self._beta * F.logsigmoid(log_odds)
        found = {"nll": cross_entropy.detach().sum(), "log_odds": log_odds.detach().sum()}
        further = {name: WeightedSum(sum=value, weight=len(means)) for name, value in found.items()}
        summed = pair_sums(losses, rewards=self._beta * means.detach(), further=further)
        return with_router_losses(summed, routers=outputs.routers, sums=outputs.auxiliary)


def pair_sums(losses: Tensor, *, rewards: Tensor, further: Mapping[str, WeightedSum] | None = None) -> WeightedSum:
    """The summed losses, with the metrics of their pairs."""
    count = len(losses)
    chosen, rejected = rewards.unbind(1)
    sums = {
        "rewards_chosen": chosen.sum(),
        "rewards_rejected": rejected.sum(),
        "rewards_margin": (chosen - rejected).sum(),
        "accuracy": (chosen > rejected).float().sum(),
    }
    found = {name: WeightedSum(sum=value, weight=count) for name, value in sums.items()}
    return WeightedSum(sum=losses.sum(), weight=count, metrics={**found, **(further or {})})
