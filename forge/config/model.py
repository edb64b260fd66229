"""`model:` the network that is trained."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from forge.config.section import FieldError, Section, Strings

_ORIGINS = ("architecture", "from_pretrained", "class")


class ModelSpec(Section):
    """A transformers causal language model: an `architecture` and its config, or pretrained weights."""

    model_config = ConfigDict(extra="allow")

    architecture: str | None = Field(None, min_length=1)
    """Any transformers `model_type` with a causal LM head, such as `llama`, `gpt2` or `qwen3`. All other keys of
    this section are keys of its config (`hidden_size`, `num_hidden_layers`, ...) and are checked against it.
    Weights are initialised from `training.seed`."""

    from_pretrained: str | None = Field(None, min_length=1)
    """A Hugging Face Hub id, or a local folder in its layout: config and weights are loaded from it."""

    # A field whose name is a keyword of Python has to be declared through the class body's own namespace.
    __annotations__["class"] = "str | None"
    locals()["class"] = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="A class from the folder of `code`, as `module:Class`, such as `my_models:TinyMixer`: an "
        "`nn.Module` whose `forward(input_ids)` returns logits. All other keys of this section are passed to its "
        "constructor, and so are `vocab_size`, `seq_len` and `eot_id` if it takes them.",
    )

    freeze: Strings = ()
    """Parameters that are not trained: names or glob patterns, such as `model.embed_tokens` or
    `model.layers.[0-9].*`. A pattern also matches everything below the name it matches."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if "model_type" in self.config_overrides:
            raise FieldError("model_type", "forge has another name for this key", nearest="architecture")
        if sum(getattr(self, name) is not None for name in _ORIGINS) != 1:
            raise ValueError("give one of 'architecture', 'from_pretrained' and 'class'")
        return self

    @property
    def class_reference(self) -> str | None:
        """The value of the key `class`."""
        reference: str | None = getattr(self, "class")
        return reference

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The keys of the transformers config."""
        return dict(self.model_extra or {})
