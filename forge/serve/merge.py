"""The weights of a checkpoint with adapters: merged into one model, or as an adapter folder of peft.

Merging adds each adapter to its weight in fp32, one tensor at a time.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge.checkpoint.adapter_config import adapter_config_from_record, shortest_names
from forge.checkpoint.intervals import Interval
from forge.checkpoint.manifest import ModelShape
from forge.checkpoint.peft_folder import CONFIG_FILE, PREFIX
from forge.checkpoint.reader import Checkpoint
from forge.errors import CheckpointError
from forge.inference.weights import CheckpointWeights
from forge.model.adapter_names import is_adapter
from forge.model.checkpoint_files import layers_with_adapters, merged_weight

_MAGNITUDE = ".lora_magnitude_vector.weight"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
"""peft's `task_type` by the end of the name of a transformers class."""


class MergedWeights:
    """The weights of a checkpoint, each with its adapter added; read as `CheckpointWeights`."""

    def __init__(self, weights: CheckpointWeights, checkpoint: Checkpoint) -> None:
        self._weights, self._shape = weights, checkpoint.shape
        self._layers = {layer.weight: layer for layer in layers_with_adapters(checkpoint.shape)}

    def interval(self, name: str) -> Interval:
        """The interval of a whole parameter or buffer; a merged one is fp32."""
        found = self._weights.interval(name)
        return replace(found, dtype="F32") if name in self._layers else found

    def pieces(self, name: str, *, max_numel: int) -> Iterator[Tensor]:
        """Yield the elements of a parameter or buffer in order, as flat tensors of at most `max_numel` elements.

        Raises: CheckpointError if they cannot be read.
        """
        if name in self._layers:
            merged = merged_weight(self._layers[name], read=self._whole)
            yield from torch.split(merged.reshape(-1), max_numel)
        else:
            yield from self._weights.pieces(name, max_numel=max_numel)

    def _whole(self, name: str) -> Tensor:
        shape = self._shape.parameters[name].shape
        flat = [piece.float() for piece in self._weights.pieces(name, max_numel=2**62)]
        return (torch.cat(flat) if flat else torch.empty(0)).view(shape)


def exported_names(shape: ModelShape, *, adapters: bool) -> dict[str, str]:
    """Return the tensors to export → their names in the file.

    Args:
        adapters: those of an adapter folder: the adapters and what is trained whole; else those of the model.
    """
    if not adapters:
        return {name: name for name in shape.parameters if not (shape.adapters and is_adapter(name))}
    trained = [name for name, parameter in shape.parameters.items() if parameter.kind == "master"]
    return {name: f"{PREFIX}{_peft_name(name)}" for name in trained}


def require_adapters(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError unless a checkpoint has adapters that a folder of peft can hold."""
    shape = checkpoint.shape
    if not shape.adapters:
        raise CheckpointError(f"{checkpoint.url} holds no adapters: the job has no model.lora")
    layers_with_adapters(shape)
    whole = {name for name, one in shape.parameters.items() if one.kind == "master" and not is_adapter(name)}
    tied = next((of for of in shape.tied.values() if of in whole), None)
    if tied is not None:
        raise CheckpointError(
            f"{checkpoint.url}: {tied} is trained whole and tied to another weight, which peft would leave as it "
            "was; export the merged model instead"
        )


def write_adapter_config(folder: Path, shape: ModelShape) -> None:
    """Write `adapter_config.json`. Raises: OSError."""
    config = adapter_config_from_record(shape.adapters)
    names = shape.config.get("architectures") or [""]
    whole = (name for name, one in shape.parameters.items() if one.kind == "master" and not is_adapter(name))
    body: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if str(names[0]).endswith(end)), None),
        "base_model_name_or_path": shape.base.source if shape.base is not None else None,
        "revision": shape.base.revision if shape.base is not None else None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "bias": "none",
        "target_modules": list(shortest_names(config.modules, shape=shape)),
        "target_parameters": list(config.parameters) or None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")


def _peft_name(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(_MAGNITUDE) else name
