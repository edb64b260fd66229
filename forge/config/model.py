"""`model:` the network that is trained."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from forge.config.section import FieldError, Section


class ModelSpec(Section):
    """A transformers causal language model: an `architecture` and its config, or pretrained weights."""

    model_config = ConfigDict(extra="allow")

    architecture: str | None = Field(None, min_length=1)
    """Any transformers `model_type` with a causal LM head, such as `llama`, `gpt2` or `qwen3`. All other keys of
    this section are keys of its config (`hidden_size`, `num_hidden_layers`, ...) and are checked against it.
    Weights are initialised from `training.seed`."""

    from_pretrained: str | None = Field(None, min_length=1)
    """A Hugging Face Hub id, or a local folder in its layout: config and weights are loaded from it."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if "model_type" in self.config_overrides:
            raise FieldError("model_type", "forge has another name for this key", nearest="architecture")
        if (self.architecture is None) == (self.from_pretrained is None):
            raise ValueError("give either 'architecture' or 'from_pretrained'")
        return self

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The keys of the transformers config."""
        return dict(self.model_extra or {})
