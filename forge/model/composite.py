"""`architecture: encoder-decoder`: an encoder and a decoder of transformers, such as two BERTs, in one model.

    model:
      architecture: encoder-decoder
      encoder: {architecture: bert, hidden_size: 128, num_hidden_layers: 2}
      decoder: {architecture: bert, hidden_size: 128, num_hidden_layers: 2}

The decoder gets cross attention. Source: Rothe et al., "Leveraging Pre-trained Checkpoints for Sequence Generation
Tasks", arXiv 1907.12461; transformers' `EncoderDecoderModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from forge.errors import ModelError

ARCHITECTURE = "encoder-decoder"
PARTS = ("encoder", "decoder")


def check_parts(given: Mapping[str, Any]) -> None:
    """Raises: ModelError if a part of the model is missing, has no known architecture or has unknown keys."""
    for name in PARTS:
        part = given.get(name)
        if not isinstance(part, Mapping) or "architecture" not in part:
            problem = f"an encoder-decoder needs {name}: {{architecture: bert, ...}}, with the keys of its config"
            raise ModelError(problem, key=name if name in given else "architecture")
        architecture = part["architecture"]
        known = _architectures(name)
        if architecture not in known:
            problem = f"transformers has no {name} of this name"
            raise ModelError(problem, key=f"{name}.architecture", choices=tuple(sorted(known)))
        config = AutoConfig.for_model(architecture)
        if name == "decoder" and not hasattr(config, "add_cross_attention"):
            problem = f"{type(config).__name__} has no cross attention, by which a decoder reads its source"
            raise ModelError(problem, key=f"{name}.architecture")


def part_keys(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the keys of a part for its config: of the decoder, with cross attention and without look-ahead."""
    own = {key: value for key, value in given[name].items() if key != "architecture"}
    return own | ({"is_decoder": True, "add_cross_attention": True} if name == "decoder" else {})


def encoder_of(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the layers that read the source: the encoder's, or that of the text model as a whole."""
    encoder = getattr(config, "encoder", None)
    return encoder if isinstance(encoder, PretrainedConfig) else config.get_text_config()


def _architectures(name: str) -> Mapping[str, Any]:
    is_decoder = name == "decoder"
    found: Mapping[str, Any] = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if is_decoder
        else modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return found
