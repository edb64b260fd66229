"""Models of the auto classes of transformers: an `architecture` by name, or the folder of `from_pretrained`.

The config consists of the job's keys, with vocabulary and positions taken from the data. `forge.model.init`
initialises the weights. With `from_pretrained` the model is built without values, and each rank reads its own shard
afterwards (`forge.model.pretrained`).
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from forge.config.checkpoint_path import is_checkpoint
from forge.config.model import ModelSpec
from forge.errors import ModelError, PlanError
from forge.fs import leads_to_folder
from forge.model.adapter_targets import AdapterTargets, find_targets, require_dropout_by_sample
from forge.model.adapters import adapter_config, add_adapters, require_peft
from forge.model.auto_classes import AUTO_CLASSES, build_on_meta, limited_modules
from forge.model.checkpoint_files import open_weights, require_same_adapters
from forge.model.dropout import has_dropout, require_randomness_by_sample
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.count import count_model
from forge.model.freeze import freeze_parameters
from forge.model.init import initialise
from forge.model.kept_activations import KeptBytes, kept_bytes_per_row
from forge.model.look_ahead import probe_forward
from forge.model.new_head import folder_model, require_same_labels, require_whole_modules
from forge.model.peft_weights import require_peft_folder
from forge.model.position_wise import has_positionwise_head
from forge.model.pretrained import PretrainedWeights, some
from forge.model.quantise import num_quantised, quantise, require_bitsandbytes
from forge.model.router_loss import COEFFICIENTS, has_router_loss, require_routing_by_row, router_losses_of
from forge.model.selective_checkpoint import checkpointing_problem
from forge.model.seq2seq import parameters_of_sources
from forge.model.transformers_config import build_config, check_keys, load_config, read_generation
from forge.model.weight_files import is_downloaded
from forge.plan.inputs import PLAIN_ATTENTION_TOKENS, ModelInfo
from forge.process import one_line


class TransformersFamily:
    """Models that the auto classes of transformers know, and `transformer-2017`."""

    def inspect(self, spec: ModelSpec, data: DataShape) -> ModelInfo:
        check_keys(spec, auto_class=data.auto_class)
        config, model = _build_or_blame(spec, data)
        require_randomness_by_sample(config)
        freeze_parameters(model, spec.freeze)
        notes = _check_weights(spec, model, data=data) if spec.from_pretrained is not None else ()
        probe = probe_forward(config, seq_len=data.seq_len, auto_class=data.auto_class)
        if probe.problem is not None:
            raise ModelError(probe.problem, key=_origin(spec))
        is_causal, is_seq2seq = (
            data.auto_class == name for name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
        )
        if is_seq2seq and probe.looks_ahead:
            raise ModelError("the decoder sees the tokens after the one that it predicts", key=_origin(spec))
        if (is_causal or is_seq2seq) and probe.looks_ahead is None:
            notes += ("not checked whether it sees later tokens: no small copy of it can be run",)
        notes += _check_router(spec, model)
        notes += _adapt(spec, data, model, device=None)
        kept = None if is_seq2seq else kept_bytes_per_row(model, seq_len=data.seq_len)
        info = count_model(
            model, config, data=data, of_sources=parameters_of_sources(config) if is_seq2seq else None
        )
        if spec.lora is not None and spec.lora.quantize != "none":
            info = replace(info, num_quantised_parameters=num_quantised(model))
        if spec.from_pretrained is not None:
            frozen = info.num_parameters - info.num_trainable_parameters
            info = replace(info, num_base_parameters=frozen, generation=read_generation(spec.from_pretrained))
        if data.auto_class == "AutoModelForMaskedLM":
            is_positionwise = has_positionwise_head(config, seq_len=data.seq_len, auto_class=data.auto_class)
            info = replace(info, has_positionwise_head=is_positionwise)
        problem = _look_ahead_problem(config, seq_len=data.seq_len) if is_causal and probe.looks_ahead else None
        drops = has_dropout(config)
        sdpa_problem = None if model._supports_sdpa else f"{info.class_name} of transformers does not support sdpa"
        attention = "eager" if drops or sdpa_problem else build_config(spec, data)._attn_implementation
        if kept is not None:
            info = _with_kept(info, kept)
        info = replace(info, attention=attention, has_dropout=drops)
        info = replace(
            info,
            checkpointing_problem=checkpointing_problem(model),
            sdpa_problem=sdpa_problem,
            flash_problem=_flash_problem(model),
        )
        return replace(info, notes=notes, look_ahead_problem=problem)

    def build(self, spec: ModelSpec, data: DataShape, *, options: BuildOptions) -> nn.Module:
        config = build_config(spec, data)
        model = build_from_config(config, options=options, data=data)
        gather = options.sharding.gather if options.sharding else None
        if not options.skip_init and spec.from_pretrained is None:
            initialise(model, seed=options.seed, gather=gather)
        elif not options.skip_init and _may_lack_weights(spec, data):
            absent = self.open_pretrained(spec, data).absent
            if absent:
                initialise(model, seed=options.seed, gather=gather, only=absent)
        model.tie_weights()
        freeze_parameters(model, spec.freeze)
        _adapt(spec, data, model, device=options.device)
        return cast(nn.Module, model)

    def open_pretrained(self, spec: ModelSpec, data: DataShape) -> PretrainedWeights:
        assert spec.from_pretrained is not None
        model = build_on_meta(build_config(spec, data), auto_class=data.auto_class)
        return _open_weights(spec, model, data=data)

    def import_classes(self, spec: ModelSpec, data: DataShape) -> None:
        model = build_on_meta(build_config(spec, data), auto_class=data.auto_class)
        if spec.lora is not None:
            add_adapters(model, adapter_config(spec.lora, find_targets(model, spec.lora, absent=())))


def _flash_problem(model: Any) -> str | None:
    """Why a class of transformers cannot use the packages flash-attn and flash-attn-3."""
    name = type(model).__name__
    if not model._supports_flash_attn:
        return f"{name} of transformers does not support FlashAttention"
    kernels = getattr(model, "_compatible_flash_implementations", None)
    if kernels is not None and not any(str(kernel).startswith("flash_attention") for kernel in kernels):
        return f"{name} of transformers has FlashAttention with kernels of the Hub only: {', '.join(kernels)}"
    return None


def _with_kept(info: ModelInfo, kept: KeptBytes) -> ModelInfo:
    problem = f"{info.class_name} changes the result of a matrix product in place, so it cannot be kept"
    return replace(
        info,
        layer_bytes_per_row=kept.layers,
        product_bytes_per_row=kept.products,
        selective_problem=problem if kept.changes_products else None,
    )


def _origin(spec: ModelSpec) -> str:
    return "architecture" if spec.from_pretrained is None else "from_pretrained"


def _adapt(spec: ModelSpec, data: DataShape, model: nn.Module, *, device: torch.device | None) -> tuple[str, ...]:
    """Put the adapters of `model.lora` into a model, if it has that section.

    Args:
        device: where weights are quantised, if the job says so; None if the model is only inspected.

    Returns: what the plan says about them.
    Raises: ModelError, PlanError.
    """
    if spec.lora is None:
        return ()
    require_peft()
    # The model itself may be partitioned, and its weights may have no shape.
    whole = build_on_meta(build_config(spec, data), auto_class=data.auto_class)
    base = spec.from_pretrained or ""
    is_here = device is not None or leads_to_folder(Path(base).expanduser()) or is_downloaded(base)
    require_dropout_by_sample(spec.lora, attention=str(whole.config._attn_implementation))
    weights = _open_weights(spec, whole, data=data) if is_here else None
    targets = find_targets(whole, spec.lora, absent=weights.absent if weights is not None else ())
    config = adapter_config(spec.lora, targets)
    source, notes = spec.lora.init_from, cast(tuple[str, ...], ())
    if source is not None and is_checkpoint(source) and weights is not None:
        require_same_adapters(source, config, trained=targets.trained, files=weights.files)
    elif source is not None and not is_checkpoint(source):
        add_adapters(whole, config, trained=targets.trained)
        notes = require_peft_folder(source, whole, files=weights.files if weights is not None else None)
    add_adapters(model, config, trained=targets.trained)
    if spec.lora.quantize != "none":
        require_bitsandbytes()
        if device is not None and weights is not None:
            quantise(model, weights, trained=targets.trained, device=device)
    return (*_about_adapters(spec, targets, model), *notes)


def _about_adapters(spec: ModelSpec, targets: AdapterTargets, model: nn.Module) -> tuple[str, ...]:
    """Return what the plan says about adapters: on which layers they are, and how much is trained."""
    assert spec.lora is not None
    names = Counter(name.rpartition(".")[2] for name in (*targets.modules, *targets.parameters))
    listed = ", ".join(f"{count} {name}" for name, count in names.items())
    whole = f"; trained whole: {some(targets.trained)}" if targets.trained else ""
    kind = "DoRA" if spec.lora.dora else "LoRA"
    about = f"{kind} adapters of rank {spec.lora.rank} and alpha {spec.lora.scaled_alpha:g} on {listed}{whole}"
    if spec.lora.quantize != "none":
        about += "; frozen linear layers in 4 bits (NF4)"
    if spec.lora.init_from is not None:
        about += f"; begun from those of {spec.lora.init_from}"
    return (about, *targets.notes)


def build_from_config(config: PretrainedConfig, *, options: BuildOptions, data: DataShape) -> PreTrainedModel:
    """Build a model whose weights have no values yet."""
    is_short = options.device.type == "cpu" and data.seq_len <= PLAIN_ATTENTION_TOKENS
    # Fused attention draws its dropout from a stream of its own, which a seed per sample cannot reach.
    if has_dropout(config):
        config._attn_implementation = "eager"
    elif config._attn_implementation is None:
        config._attn_implementation = options.attention or ("eager" if is_short else None)
    sharding = options.sharding
    with no_init_weights(), limited_modules(), sharding.construct() if sharding else nullcontext():
        return cast(
            PreTrainedModel,
            AUTO_CLASSES[data.auto_class].cls.from_config(config, dtype=options.dtype, trust_remote_code=False),
        )


def _may_lack_weights(spec: ModelSpec, data: DataShape) -> bool:
    """Whether a folder need not have every weight of the model."""
    return bool(spec.config_overrides) or AUTO_CLASSES[data.auto_class].has_labels


def _open_weights(spec: ModelSpec, model: Any, *, data: DataShape) -> PretrainedWeights:
    """Open the weights of `from_pretrained`. What only the job's keys add to its model may be absent; of a
    classifier also the head, where the folder is of a model without one.

    Raises: ModelError if weights of the folder's own model are missing, or any has another shape; PlanError.
    """
    files = open_weights(spec.from_pretrained or "")
    if not _may_lack_weights(spec, data):
        return PretrainedWeights(files, model, may_grow=spec.resize_embeddings)
    own_config = load_config(files.source)
    if AUTO_CLASSES[data.auto_class].has_labels:
        folder = folder_model(model, own_config)
        own_names = folder.required
        if folder.has_head:
            require_same_labels(own_config, model.config, source=files.source)
    else:
        own = build_on_meta(own_config, auto_class=data.auto_class)
        own_names = frozenset(name for name, _ in own.named_parameters())
    try:
        weights = PretrainedWeights(
            files, model, is_required=own_names.__contains__, may_grow=spec.resize_embeddings
        )
    except ModelError as error:
        if not spec.config_overrides:
            raise
        keys = ", ".join(f"{key}: {value}" for key, value in spec.config_overrides.items())
        raise ModelError(f"{error.problem}; the job sets {keys}", key=next(iter(spec.config_overrides))) from error
    if not spec.config_overrides:
        require_whole_modules(weights, weights.absent)
    return weights


def _look_ahead_problem(config: PretrainedConfig, *, seq_len: int) -> str:
    """Describe a model that sees later tokens, and the key that would change it, if there is one."""
    model = build_on_meta(config, auto_class="AutoModelForCausalLM")
    problem = f"in {type(model).__name__} with these keys a position sees the tokens after it"
    if getattr(config, "is_decoder", True):
        return problem
    decoder = type(config).from_dict(config.to_dict() | {"is_decoder": True})
    is_cured = probe_forward(decoder, seq_len=seq_len).looks_ahead is False
    return f"{problem}; set model.is_decoder: true" if is_cured else problem


def _check_router(spec: ModelSpec, model: Any) -> tuple[str, ...]:
    """Return what the plan says about an auxiliary loss of experts.

    Raises: ModelError if the model asks for one that forge does not compute.
    """
    given = [key for key in COEFFICIENTS if key in spec.config_overrides]
    require_routing_by_row(model, key=_origin(spec))
    if router_losses_of(model):
        return ()
    if given:
        return (f"model.{given[0]} has no effect without model.output_router_logits: true",)
    if has_router_loss(model):
        return ("no auxiliary loss for the routers of the experts; model.output_router_logits: true adds it",)
    return ()


def _check_weights(spec: ModelSpec, model: Any, *, data: DataShape) -> tuple[str, ...]:
    """Check names and shapes of the pretrained weights, from the headers of their files.

    Returns: what the plan has to say about them.
    Raises: ModelError, PlanError.
    """
    source = spec.from_pretrained or ""
    if not leads_to_folder(Path(source).expanduser()) and not is_downloaded(source):
        return (f"the weights of {source} are not on this machine; their names and shapes are not checked yet",)
    weights = _open_weights(spec, model, data=data)
    tie = "tie_word_embeddings"
    weights.require_equal_ties(key=tie if tie in spec.config_overrides else "from_pretrained")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    untrained = sorted(set(frozen) & set(weights.absent))
    if untrained:
        raise ModelError(f"freezes weights that are not in {source}: {some(untrained)}", key="freeze")
    if spec.resize_embeddings and (spec.lora is not None or set(frozen) & set(weights.grown)):
        raise ModelError(
            "adds rows that must be trained, and the job freezes the embedding; train all weights, save the folder "
            "and adapt that one",
            key="resize_embeddings",
        )
    keys = ", ".join(f"{key}: {value}" for key, value in spec.config_overrides.items())
    reason = f" (the job sets {keys})" if keys else ""
    what = "a new head, " if AUTO_CLASSES[data.auto_class].has_labels and not keys else ""
    notes = [_about_growth(weights, model)] if weights.grown else []
    if weights.absent:
        notes.append(f"not in {source}, {what}drawn from the seed{reason}: {some(weights.absent)}")
    elif AUTO_CLASSES[data.auto_class].has_labels:
        notes.append(require_same_labels(load_config(source), model.config, source=source))
    if weights.files.num_merged:
        count = weights.files.num_merged
        notes.append(f"{source} holds adapters, which are added to {count} of its weights (merged in fp32)")
    if weights.unused:
        notes.append(f"in {source}, but not in the model, so not used{reason}: {some(weights.unused)}")
    return tuple(notes)


def _about_growth(weights: PretrainedWeights, model: Any) -> str:
    """Say which tensors get rows for new tokens."""
    rows = model.config.get_text_config().vocab_size
    return (
        f"enlarged to {rows:,} rows (model.resize_embeddings): {some(weights.grown)}; each added row is the mean "
        "of the existing ones"
    )


def _build_or_blame(spec: ModelSpec, data: DataShape) -> tuple[PretrainedConfig, Any]:
    """Build the config, and the model on the meta device. Raises: ModelError with the keys of the job to blame."""
    try:
        config = build_config(spec, data)
        return config, build_on_meta(config, auto_class=data.auto_class)
    except PlanError as error:
        failure: Exception = error
        problem = error.problem
    except Exception as error:  # a config that transformers builds and its model class cannot
        failure, problem = error, f"transformers cannot build this model: {one_line(error)}"
    if isinstance(failure, ModelError) and failure.key not in (None, "from_pretrained"):
        raise failure
    blamed = _blamed(spec, data, problem=problem)
    key = blamed[0] if blamed else getattr(failure, "key", None)
    raise ModelError(problem, key=key, suspects=blamed) from failure


def _blamed(spec: ModelSpec, data: DataShape, *, problem: str) -> tuple[str, ...]:
    """The keys of the job without any one of which the model could be built; one that is named comes first."""
    named = re.search(r"field '(\w+)'", problem)
    if named is not None and named[1] in spec.config_overrides:
        return (named[1],)
    found = []
    for key in spec.config_overrides:
        rest = {name: value for name, value in spec.model_dump(exclude_unset=True).items() if name != key}
        try:
            build_on_meta(build_config(ModelSpec.model_validate(rest), data), auto_class=data.auto_class)
        except Exception:  # any failure: this key is not the only cause
            continue
        found.append(key)
    return tuple(sorted(found, key=lambda key: key not in problem))
