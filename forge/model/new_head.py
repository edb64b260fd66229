"""Which weights of a classifier may be missing in the folder of `from_pretrained`: those of a new head.

A folder holds the model that its config names in `architectures`, such as `BertForMaskedLM`. What that model does
not have, and the classifier does, is new: the classifier itself, and its pooling layer. Everything else must be in
the files.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from forge.errors import ModelError
from forge.model.pretrained import PretrainedWeights, some

_MOST_LABELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderModel:
    """The model that a folder holds, by its config."""

    required: frozenset[str]
    """Parameters of the classifier that the files must have."""
    has_head: bool
    """Whether it is a classifier of the same kind, whose head is kept."""


def folder_model(model: Any, own_config: PretrainedConfig) -> FolderModel:
    """Compare a classifier with the model of the folder that its weights come from.

    Args:
        model: the classifier.
        own_config: the config of the folder.
    """
    named = (getattr(own_config, "architectures", None) or [None])[0]
    base = type(model.base_model)
    found = vars(sys.modules[type(model).__module__]).get(named) if isinstance(named, str) else None
    own_class = found if isinstance(found, type) and issubclass(found, PreTrainedModel) else base
    names = _renamed(_on_meta(own_class, own_config), model)
    if own_class is base and "add_pooling_layer" in inspect.signature(base.__init__).parameters:
        names = _renamed(_on_meta(base, own_config, add_pooling_layer=False), model)  # such folders are common
    return FolderModel(required=frozenset(names), has_head=own_class is type(model))


def require_whole_modules(weights: PretrainedWeights, head: Collection[str]) -> None:
    """Raises: ModelError if the files have a part of a module that would be new."""
    for name in head:
        module = name.rpartition(".")[0]
        others = [other for other in weights.names if other.rpartition(".")[0] == module and other in weights]
        if others:
            raise ModelError(
                f"{weights.files.source} has {some(others)}, but lacks {name} of the same layer",
                key="from_pretrained",
            )


def require_same_labels(own_config: PretrainedConfig, config: PretrainedConfig, *, source: str) -> str:
    """Compare the labels of a folder that has a head with those of the data.

    Returns: what the plan says about them.
    Raises: ModelError if they differ.
    """
    own, given = _names(own_config), _names(config)
    remedy = "give the model without its classifier, or name the labels of the data likewise"
    if len(own) != len(given):
        problem = f"{source} tells {len(own)} labels apart ({_listed(own)}), the data have {len(given)}"
        raise ModelError(f"{problem} ({_listed(given)}); {remedy}", key="from_pretrained")
    is_unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(own))
    if not is_unnamed and own != given and not all(name == f"LABEL_{i}" for i, name in enumerate(given)):
        order = "in another order" if set(own) == set(given) else "other ones"
        raise ModelError(
            f"the head of {source} has the labels {_listed(own)}, and the data have {order}: {_listed(given)}; "
            "list them in data.labels.names in the order of the head",
            key="from_pretrained",
        )
    return f"the head of {source} is kept" + (", though its labels have no names" if is_unnamed else "")


def _on_meta(cls: Any, config: PretrainedConfig, **options: Any) -> Any:
    with torch.device("meta"):
        return cls._from_config(config, **options)


def _renamed(own: nn.Module, model: Any) -> set[str]:
    """The names that the parameters of `own` have in `model`."""
    before, now = _prefix(own), _prefix(model)
    names = [name for name, _ in own.named_parameters(remove_duplicate=False)]
    return {now + name.removeprefix(before) if name.startswith(before) else name for name in names}


def _prefix(model: Any) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _names(config: PretrainedConfig) -> list[str]:
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LABELS} more" if len(names) > _MOST_LABELS else ""
    return ", ".join(names[:_MOST_LABELS]) + more
