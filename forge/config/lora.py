"""`model.lora:` low-rank adapters that are trained while the pretrained weights stay frozen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from forge.config.section import FieldError, Number, Section, Strings

ALL_LINEAR = "all-linear"


class LoraSpec(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) by the library peft. The weights of `from_pretrained` are frozen;
    snapshots and checkpoints hold the adapters and their optimizer state alone."""

    rank: int = Field(8, ge=1, le=4096)
    """Inner size of an adapter: `B·A` with `A` of rank × inputs and `B` of outputs × rank. peft: `r`."""

    alpha: Number | None = Field(None, gt=0)
    """What an adapter adds is scaled by `alpha / rank`. By default the rank, so that the scale is 1. peft:
    `lora_alpha`."""

    dropout: Number = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped while training, drawn by sample, so that it does not depend on
    the number of workers. peft: `lora_dropout`."""

    targets: Strings = (ALL_LINEAR,)
    """Layers that get an adapter: `all-linear`, which is every linear layer but the output head, or names and glob
    patterns, such as `[q_proj, v_proj]` or `model.layers.[0-9].mlp`. A name matches the end of a dotted name and
    everything below it. Experts that a model keeps in one tensor are named like it: `experts.gate_up_proj`. peft:
    `target_modules`, `target_parameters`."""

    dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353): the length of each output's weights is trained as well.
    peft: `use_dora`."""

    rslora: bool = False
    """Scale by `alpha / √rank` (rank-stabilised LoRA, arXiv 2312.03732). peft: `use_rslora`."""

    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: keep the frozen linear layers in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes, which is not
    installed with forge. All but the output head and what is trained whole; not under ZeRO 3, and not with `dora`.
    transformers: `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)`."""

    modules_to_save: Strings = ()
    """Modules that are trained whole beside the adapters, by name or pattern, such as `lm_head`. They are in
    snapshots and checkpoints in full."""

    init_from: str | None = Field(None, min_length=1)
    """Go on with the adapters of another run, named as in `model.init_from`, or of a folder that peft has written
    (`adapter_config.json`, `adapter_model.safetensors`). Its keys of this section are the defaults; those given
    must be the same, apart from `dropout` and `quantize`. `from_pretrained` is by default what the adapters were
    trained on, and must have the same content."""

    @model_validator(mode="after")
    def _knows_its_weights(self) -> LoraSpec:
        if self.dora and self.quantize != "none":
            problem = (
                "begins with the lengths of the weights' rows, which quantize changes; leave one of the two out"
            )
            raise FieldError("dora", problem, depends_on=("quantize",))
        return self

    @property
    def scaled_alpha(self) -> float:
        """`alpha`, or its default."""
        return float(self.rank if self.alpha is None else self.alpha)
