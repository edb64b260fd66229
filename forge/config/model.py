"""`model:` which network is trained."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from forge.config.section import FieldError, Section


class ModelSpec(Section):
    """A transformers causal language model: an `architecture` with its config's own keys, or a folder."""

    model_config = ConfigDict(extra="allow")

    architecture: str | None = Field(None, min_length=1)
    """Any transformers `model_type` with a causal LM head, such as `llama`, `gpt2` or `qwen3`. All
    further keys of this section are that config's own (`hidden_size`, `num_hidden_layers`, ...) and
    are checked against it; weights are initialised from `training.seed`."""

    from_pretrained: str | None = Field(None, min_length=1)
    """A local folder in the hub's layout, or a hub id: configuration and weights are taken from there."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if "model_type" in self.config_overrides:
            raise FieldError("model_type", "the architecture is named by another key", nearest="architecture")
        if (self.architecture is None) == (self.from_pretrained is None):
            raise ValueError("give either 'architecture' or 'from_pretrained'")
        return self

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The further keys: the transformers config's own."""
        return dict(self.model_extra or {})
