"""Whether the ranks of a group can share the sequences of a model (`training.sequence_parallel`).

Each rank then runs the model on a part of the positions, and only attention sees all of them. That is exact for a
model whose layers compute each position by itself, call attention through transformers' interface, and mask by
position alone. Further conditions, such as caps and sinks, cannot be seen from outside, so classes are listed.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from forge.model.composite import encoder_of

SERVED = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
    | {"Qwen3MoeForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Olmo2ForCausalLM", "SmolLM3ForCausalLM"}
    | {"PhiForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM", "GraniteForCausalLM"}
)
"""Classes whose losses `tests/train/test_sequence_parallel.py` compares with those of whole sequences."""


def sequence_parallel_problem(model: nn.Module) -> str | None:
    """Return why ranks cannot share a sequence of a model, such as "BloomForCausalLM is not supported".

    Only class and config are examined, so the model may be on the meta device.

    Returns: None if they can.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if name not in SERVED or not isinstance(config, PretrainedConfig):
        return f"{name} is not among the supported models: {', '.join(sorted(SERVED))}"
    for key, value in encoder_of(config).to_dict().items():
        if "att" in key and "drop" in key and isinstance(value, float) and value > 0:
            problem = "dropout within attention is not drawn for parts of sequences"
            return f"model.{key} is {value:g}: {problem}; set it to 0"
    if getattr(config, "output_router_logits", False):
        return "model.output_router_logits is true: the auxiliary loss of routers needs whole sequences"
    return None
