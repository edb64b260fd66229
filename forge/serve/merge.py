"""The weights of a checkpoint with adapters: merged into one model, or as an adapter folder of peft.

Merging adds each adapter to its weight in fp32, one tensor at a time.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge.checkpoint.intervals import Interval
from forge.checkpoint.manifest import ModelShape
from forge.checkpoint.reader import Checkpoint
from forge.errors import CheckpointError
from forge.model.adapter_names import is_adapter
from forge.model.adapter_weights import merged
from forge.model.adapters import AdapterLayer, adapter_config_from_record, adapter_layers, add_adapters
from forge.model.auto_classes import auto_class_of_config, build_on_meta
from forge.model.transformers_config import config_from_record
from forge.serve.weights import CheckpointWeights

ADAPTER_FILE = "adapter_model.safetensors"
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
        config = config_from_record(checkpoint.shape.config)
        model = build_on_meta(config, auto_class=auto_class_of_config(config))
        add_adapters(model, adapter_config_from_record(checkpoint.shape.adapters))
        self._weights, self._shape = weights, checkpoint.shape
        self._layers = {layer.weight: layer for layer in adapter_layers(model)}

    def interval(self, name: str) -> Interval:
        """The interval of a whole parameter or buffer; a merged one is fp32."""
        found = self._weights.interval(name)
        return replace(found, dtype="F32") if name in self._layers else found

    def pieces(self, name: str, *, max_numel: int) -> Iterator[Tensor]:
        """Yield the elements of a parameter or buffer in order, as flat tensors of at most `max_numel` elements.

        Raises: CheckpointError if they cannot be read.
        """
        if name in self._layers:
            yield from torch.split(self._merged(self._layers[name]).reshape(-1), max_numel)
        else:
            yield from self._weights.pieces(name, max_numel=max_numel)

    def _merged(self, layer: AdapterLayer) -> Tensor:
        magnitude = self._whole(f"{layer.prefix}{_MAGNITUDE}") if layer.use_dora else None
        return merged(
            self._whole(layer.weight),
            layer,
            factor_a=self._whole(f"{layer.prefix}.lora_A.weight"),
            factor_b=self._whole(f"{layer.prefix}.lora_B.weight"),
            magnitude=magnitude,
        )

    def _whole(self, name: str) -> Tensor:
        if name not in self._shape.parameters:
            raise CheckpointError(f"the checkpoint has no {name}, which its adapters need")
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
    return {name: f"base_model.model.{_peft_name(name)}" for name in trained}


def require_adapters(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError unless a checkpoint has adapters that a folder of peft can hold."""
    shape = checkpoint.shape
    if not shape.adapters:
        raise CheckpointError(f"{checkpoint.url} holds no adapters: the job has no model.lora")
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
        "target_modules": _shortest(config.modules, shape),
        "target_parameters": list(config.parameters) or None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")


def _peft_name(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(_MAGNITUDE) else name


def _shortest(modules: Iterable[str], shape: ModelShape) -> list[str]:
    """Name modules by their last names, where these select the same modules; else in full."""
    wanted = set(modules)
    ends = sorted({name.rpartition(".")[2] for name in wanted})
    every = {name.rpartition(".")[0] for name in [*shape.parameters, *shape.tied]}
    selected = {name for name in every if name.rpartition(".")[2] in ends}
    return ends if selected == wanted else sorted(wanted)
