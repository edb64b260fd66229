"""`training.dpo`, `training.orpo` and `training.reward`: how preference pairs are learnt from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from forge.config.section import FieldError, Number, Section

PairLoss = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "nca_pair", "apo_zero", "apo_down"]
_SMOOTHED = ("sigmoid", "robust")


class DpoSpec(Section):
    """Direct preference optimisation; only with `objective: dpo` or `ipo`."""

    loss: PairLoss | None = None
    """The loss of a pair, of the log ratios `r` of policy to reference and `d = r(chosen) - r(rejected)`.
    `sigmoid`: `-log σ(β d)`, the default of `objective: dpo` (arXiv 2305.18290). `ipo`: `(d' - 1 / 2β)²` of the
    mean log ratios per token, that of `objective: ipo` (2310.12036). `sigmoid_norm`: `-log σ(β d')`. `hinge`:
    `max(0, 1 - β d)` (2305.10425). `robust`: unbiased for labels of which `label_smoothing` are wrong
    (2403.00409). `nca_pair` (2402.05369), `apo_zero` and `apo_down` (2408.06266). Names are those of trl."""

    beta: Number = Field(0.1, gt=0)
    """β: the smaller, the further the policy may move from the reference."""

    label_smoothing: Number = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be labelled the wrong way round; only with `sigmoid`, which becomes
    conservative DPO, and `robust`."""

    reference: Literal["stored", "live"] = "stored"
    """How the reference, the model of `from_pretrained`, is asked. `stored`: its log-probabilities are computed
    once, before training starts, and stored with the prepared data; no worker holds it. `live`: in every step, with
    one more forward pass: by the model without its adapters under `model.lora`, otherwise by a second model
    that every worker holds whole, in `training.precision`."""

    @model_validator(mode="after")
    def _smooths_a_loss_that_has_it(self) -> DpoSpec:
        if self.label_smoothing and self.loss not in (None, *_SMOOTHED):
            problem = f"has no meaning for the loss {self.loss}; it is for {' and '.join(_SMOOTHED)}"
            raise FieldError("label_smoothing", problem, depends_on=("loss",))
        return self


class OrpoSpec(Section):
    """Odds ratio preference optimisation (arXiv 2403.07691); only with `objective: orpo`."""

    beta: Number = Field(0.1, gt=0)
    """Weight of the odds ratio beside the cross entropy of the chosen answer; λ in the paper."""


class RewardSpec(Section):
    """A reward model; only with `objective: reward`."""

    center_coefficient: Number = Field(0.0, ge=0)
    """Weight of `(reward(chosen) + reward(rejected))²`, which keeps rewards near 0 (arXiv 2312.09244); trl's
    `center_rewards_coefficient`."""
