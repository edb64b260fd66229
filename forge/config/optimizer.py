"""`training.optimizer:` the optimizer, its hyperparameters, and which parameters have other ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from forge.config.section import FieldError, Number, Section, raise_errors

_ADAM = {"lr": 3e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
HYPERPARAMETERS: Mapping[str, Mapping[str, float]] = {
    "adamw": _ADAM,
    "adamw-8bit": _ADAM,
    "lion": {"lr": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99},
    "muon": {**_ADAM, "momentum": 0.95},
    "adafactor": {"lr": 1e-2, "weight_decay": 0.0, "beta2_decay": -0.8, "clip_threshold": 1.0},
}
"""The hyperparameters of each optimizer with their defaults: those of its paper or of torch, `beta2` of language
models."""


class ParameterGroupSpec(Section):
    """Hyperparameters of the parameters that a pattern matches; a key that is left out stays as it is."""

    lr: Number | None = Field(None, gt=0)
    """Peak learning rate, in place of `optimizer.lr`; `layer_decay` does not change it."""

    weight_decay: Number | None = Field(None, ge=0)
    """In place of `optimizer.weight_decay`, for vectors too."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> ParameterGroupSpec:
        if self.lr is None and self.weight_decay is None:
            raise ValueError("changes nothing: give 'lr', 'weight_decay' or both")
        return self


class OptimizerSpec(Section):
    """How gradients become updates. Weights are updated in fp32; every rank updates its own shard."""

    name: Literal["adamw", "lion", "muon", "adafactor", "adamw-8bit"] = "adamw"
    """`adamw` (arXiv 1711.05101); `lion` (arXiv 2302.06675), half its state; `muon` for matrices and `adamw` for
    embeddings, output head and vectors, with updates as large as AdamW's (arXiv 2502.16982); `adafactor` (arXiv
    1804.04235), which stores only row and column means of a matrix; `adamw-8bit` (arXiv 2110.02861), moments in 8
    bits, by bitsandbytes, for `zero.stage: 0`. Nothing is compiled at run time. All except `adamw-8bit` work at
    every ZeRO stage, and their checkpoints load at every world size and stage."""

    lr: Number = Field(3e-4, gt=0)
    """Peak learning rate, reached at the end of the warm-up. By default 3e-4 for `adamw` and `muon`, a common
    starting point (small models usually take more); 1e-4 for `lion`, whose updates are larger; 1e-2 for
    `adafactor`, which multiplies it with the root mean square of each parameter and limits it to `1/√step`."""

    weight_decay: Number = Field(0.1, ge=0)
    """Decoupled weight decay, applied to matrices only, not to biases, norms and other vectors. 0.1 is usual for
    language models; 0 by default for `adafactor`."""

    beta1: Number | None = Field(None, ge=0, lt=1)
    """Decay of the first moment: 0.9 by default; of `muon` for the parameters that AdamW updates."""

    beta2: Number | None = Field(None, ge=0, lt=1)
    """Decay of the second moment. By default 0.95, lower than AdamW's usual 0.999, which is common for language
    models; of `lion`, which has no second moment, the decay of its momentum: 0.99."""

    eps: Number | None = Field(None, gt=0)
    """Added to the denominator of AdamW's update: 1e-8 by default."""

    momentum: Number | None = Field(None, ge=0, lt=1)
    """Of `muon`: decay of the (Nesterov) momentum; 0.95 by default."""

    beta2_decay: Number | None = Field(None, le=0)
    """Of `adafactor`: the decay of the second moment at step t is `1 - t^beta2_decay`; -0.8 by default."""

    clip_threshold: Number | None = Field(None, ge=1)
    """Of `adafactor`: limit of the root mean square of an update; 1 by default. torch's `d`."""

    grad_clip: Number = Field(1.0, ge=0)
    """Maximum global gradient norm; 0 disables clipping. DeepSpeed's `gradient_clipping`."""

    layer_decay: Number | None = Field(None, gt=0, le=1)
    """Layer-wise decay of the learning rate (arXiv 1801.06146): the last layer and the head have `lr`, each layer
    below it this factor less, the embeddings the least. Off by default."""

    groups: dict[str, ParameterGroupSpec] = Field(default_factory=dict)
    """Other hyperparameters for some parameters, by name or glob pattern as in `model.freeze`:
    `model.embed_tokens: {lr: 1e-5}`. The plan shows how many parameters each group has."""

    @model_validator(mode="after")
    def _has_its_hyperparameters(self) -> OptimizerSpec:
        own = HYPERPARAMETERS[self.name]
        known = dict.fromkeys(key for keys in HYPERPARAMETERS.values() for key in keys)
        raise_errors(
            [
                FieldError(
                    key, f"is no hyperparameter of {self.name}, which has {', '.join(own)}", depends_on=("name",)
                )
                for key in known
                if key not in own and getattr(self, key) is not None
            ]
        )
        for key, default in own.items():
            if key not in self.model_fields_set or getattr(self, key) is None:
                self.__dict__[key] = default  # not marked as set, so that a dumped job does not contain it
        return self

    def value(self, key: str) -> float:
        """Return a hyperparameter that this optimizer has."""
        value: float = getattr(self, key)
        return value
