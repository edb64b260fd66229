"""The auto classes of transformers, by which a model of an architecture is built for an objective."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EncoderDecoderModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from forge.errors import ModelError
from forge.model import composite
from forge.model.transformer_2017 import ARCHITECTURE, Transformer2017ForConditionalGeneration
from forge.objective.registry import AutoClass


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoModel:
    """One auto class."""

    cls: Any
    architectures: Mapping[str, Any]
    """`model_type` → the names of its classes."""
    noun: str
    """What its models are, for messages."""
    has_labels: bool = False
    """Whether the data decide about the outputs, and the head may be new on pretrained weights."""


class _HeadlessModel:
    """transformers' `AutoModel`, without the pooling layer behind the hidden states that BERT and others add."""

    @staticmethod
    def from_config(config: PretrainedConfig, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
        assert not trust_remote_code, "code of a model's folder is never executed"
        cls: Any = MODEL_MAPPING[type(config)]
        cls = cls[0] if isinstance(cls, tuple) else cls
        if "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
            options["add_pooling_layer"] = False
        built: PreTrainedModel = cls._from_config(config, **options)
        return built


class _EncoderDecoder:
    """transformers' `AutoModelForSeq2SeqLM`; an encoder that was named by itself has no pooling layer."""

    @staticmethod
    def from_config(config: PretrainedConfig, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
        if config.model_type != composite.ARCHITECTURE:
            return cast(
                PreTrainedModel,
                AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=trust_remote_code, **options),
            )
        encoder = _HeadlessModel.from_config(config.encoder, trust_remote_code=trust_remote_code, **options)
        decoder = AutoModelForCausalLM.from_config(config.decoder, trust_remote_code=trust_remote_code, **options)
        return EncoderDecoderModel(config=config, encoder=encoder, decoder=decoder)


MAX_MODULES = 250_000
"""DeepSeek-V3 has 61 layers of 257 experts, about 50,000 modules. These take about 1 GB of memory."""

_TEXT_MODELS = {
    **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}

AUTO_CLASSES: Mapping[AutoClass, AutoModel] = {
    "AutoModelForCausalLM": AutoModel(
        cls=AutoModelForCausalLM,
        architectures=modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        noun="causal language model",
    ),
    "AutoModelForMaskedLM": AutoModel(
        cls=AutoModelForMaskedLM,
        architectures=modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        noun="masked language model",
    ),
    "AutoModelForSeq2SeqLM": AutoModel(
        cls=_EncoderDecoder,
        architectures={
            **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            ARCHITECTURE: Transformer2017ForConditionalGeneration.__name__,
        },
        noun="encoder-decoder for text",
    ),
    "AutoModelForSequenceClassification": AutoModel(
        cls=AutoModelForSequenceClassification,
        architectures=modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        noun="classifier of sequences",
        has_labels=True,
    ),
    "AutoModelForTokenClassification": AutoModel(
        cls=AutoModelForTokenClassification,
        architectures=modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        noun="classifier of tokens",
        has_labels=True,
    ),
    "AutoModel": AutoModel(
        cls=_HeadlessModel,
        architectures={
            name: cls
            for name, cls in modeling_auto.MODEL_MAPPING_NAMES.items()
            if name in _TEXT_MODELS and name not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        },
        noun="encoder or decoder that gives each token of a text a hidden state",
    ),
}


def auto_class_of_config(config: PretrainedConfig) -> AutoClass:
    """The auto class of a config that forge has written, whose `architectures` names the class of the model."""
    named = (getattr(config, "architectures", None) or [""])[0]
    for name, auto in AUTO_CLASSES.items():
        known = auto.architectures.get(config.model_type, ())
        if named in ((known,) if isinstance(known, str) else known):
            return name
    return "AutoModelForCausalLM"


def build_on_meta(config: PretrainedConfig, *, auto_class: AutoClass) -> Any:
    """Build a model on the meta device, which allocates no memory. Raises: ModelError as `limited_modules`."""
    with torch.device("meta"), limited_modules():
        return AUTO_CLASSES[auto_class].cls.from_config(config, trust_remote_code=False)


@contextmanager
def limited_modules() -> Iterator[None]:
    """Stop building a model that has more modules than any.

    A few numbers of a config (layers × experts, say) can ask for more than the memory holds.

    Raises: ModelError.
    """
    count = 0

    def on_module(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise ModelError(f"the config describes a model of more than {MAX_MODULES:,} modules")

    handle = register_module_module_registration_hook(on_module)
    try:
        yield
    finally:
        handle.remove()
