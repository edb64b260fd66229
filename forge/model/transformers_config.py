"""The transformers config of a job: the job's keys over the defaults of an architecture, or over a folder's config.

No argument of a job reaches a loader of transformers: the config of a folder is loaded without any, and the job's
keys are applied to its content. Code of a folder or of the Hub is never executed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from forge.checkpoint.peft_folder import adapters_problem
from forge.checkpoint.source import open_source
from forge.config.checkpoint_path import is_checkpoint, tokenizer_of
from forge.config.model import ModelSpec, size_problems
from forge.environment import looked_in
from forge.errors import CheckpointError, ModelError, PlanError
from forge.foreign import lfs_problem, parse_json
from forge.fs import leads_to_folder
from forge.model.auto_classes import AUTO_CLASSES
from forge.model.composite import ARCHITECTURE, PARTS, check_parts, part_keys
from forge.model.families.base import DataShape
from forge.model.positions import COUNTED_FROM_PADDING
from forge.model.router_loss import COEFFICIENTS
from forge.objective.registry import AutoClass
from forge.process import one_line

_MAX_CONFIG_BYTES = 16 * 2**20
_GENERATION = "generation_config.json"
_LABEL_KEYS = ("num_labels", "id2label", "label2id", "problem_type")


def build_config(spec: ModelSpec, data: DataShape) -> PretrainedConfig:
    """Return the transformers config of a job: its keys, with vocabulary and positions taken from the data.

    Raises: PlanError if transformers refuses the architecture or a value.
    """
    given = spec.config_overrides
    if spec.from_pretrained is not None:
        config = load_config(spec.from_pretrained)
        if spec.resize_embeddings and data.vocab_size > config.get_text_config().vocab_size:
            given = {"vocab_size": data.vocab_size, **given}
        config = _with_overrides(config, given, source=spec.from_pretrained) if given else config
    else:
        config = _new_model_config(spec.architecture, given, data=data)
    if AUTO_CLASSES[data.auto_class].has_labels:
        _set_labels(config, data, given=given)
    _check_attention(config)
    _check_taken(config, given)
    return config


def config_from_record(record: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config that a checkpoint contains. Raises: ModelError if it is not one that forge writes."""
    body = {key: value for key, value in record.items() if key not in ("model_type", "auto_map")}
    wrong = next(iter(size_problems(body)), None)
    if wrong is not None:
        raise ModelError(f"the config of the checkpoint cannot be used: {wrong[0]} {wrong[1]}")
    try:
        config = AutoConfig.for_model(record["model_type"], **body)
    except Exception as error:  # transformers validates with exceptions of several unrelated classes
        raise ModelError(f"the config of the checkpoint cannot be used: {one_line(error)}") from error
    _check_attention(config)
    return config


def check_keys(spec: ModelSpec, *, auto_class: AutoClass) -> None:
    """Raises: ModelError for an unknown architecture, folder or keys of the config."""
    known_models, noun = AUTO_CLASSES[auto_class].architectures, AUTO_CLASSES[auto_class].noun
    if spec.architecture is not None:
        if spec.architecture not in known_models:
            problem = f"transformers has no {noun} of this name"
            raise ModelError(problem, key="architecture", choices=tuple(sorted(known_models)))
        config = AutoConfig.for_model(spec.architecture)
    else:
        folder = spec.from_pretrained or ""
        if folder.startswith((".", "/", "~")) and not leads_to_folder(Path(folder).expanduser()):
            raise ModelError(f"there is no such folder{looked_in(folder)}", key="from_pretrained")
        config = load_config(folder)
        if config.model_type not in known_models:
            problem = f"{folder} is of the architecture {config.model_type}, of which transformers has no {noun}"
            raise ModelError(problem, key="from_pretrained")
    of_data = [key for key in _LABEL_KEYS if key in spec.config_overrides]
    if AUTO_CLASSES[auto_class].has_labels and of_data:
        problem = "follows from the labels of the data and the objective; leave it out"
        raise ModelError(problem, key=of_data[0], more_keys=tuple(of_data[1:]))
    if spec.architecture == ARCHITECTURE:
        check_parts(spec.config_overrides)
        for name in PARTS:
            part = spec.config_overrides[name]
            _require_known(AutoConfig.for_model(part["architecture"]), part.keys() - {"architecture"}, f"{name}.")
    _require_known(config, spec.config_overrides)


def _require_known(config: PretrainedConfig, given: Iterable[str], prefix: str = "") -> None:
    """Raises: ModelError if a config has no such keys; `prefix` is that of their names in the job."""
    known = _config_keys(config)
    unknown = [prefix + key for key in given if key not in known]
    if unknown:
        problem = f"{type(config).__name__} has no such key"
        choices = tuple(sorted(prefix + key for key in known))
        raise ModelError(problem, key=unknown[0], more_keys=tuple(unknown[1:]), choices=choices)


def load_config(source: str) -> PretrainedConfig:
    """Load the config of a folder or hub id, without executing code of it.

    Raises: ModelError if the config cannot be read, needs code of its folder, or is of quantised weights.
    """
    if is_checkpoint(source):
        return _config_of_checkpoint(source)
    problem = adapters_problem(source)
    if problem is not None:
        remedy = "give the base, and merge the adapters into it with peft (merge_and_unload) where they are wanted"
        raise ModelError(f"{problem}; {remedy}", key="from_pretrained")
    folder = Path(source).expanduser()
    try:
        if leads_to_folder(folder):
            _check_file(folder / "config.json")
        config = AutoConfig.from_pretrained(
            str(folder) if leads_to_folder(folder) else source, trust_remote_code=False
        )
    except Exception as error:  # transformers validates with exceptions of several unrelated classes
        problem = f"the config of {source} cannot be used: {one_line(error)}"
        if "trust_remote_code" in str(error):
            problem = (
                f"the model of {source} consists of code in its own folder (`auto_map`), and forge does not "
                "execute it: take a model that transformers contains, or write it as a `class` in the folder of "
                "`code`"
            )
        raise ModelError(problem, key="from_pretrained") from error
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"the weights of {source} are quantised ({method or 'method not named'}), and forge trains plain "
            "floating point: give the model that they were quantised from, or save them dequantised",
            key="from_pretrained",
        )
    return config


def _config_of_checkpoint(source: str) -> PretrainedConfig:
    try:
        record = open_source(source).shape.config
    except CheckpointError as error:
        raise ModelError(str(error), key="from_pretrained") from error
    if not record:
        raise ModelError(
            f"{source} is of a class of your own: name it in model.class, with the keys of its constructor",
            key="from_pretrained",
        )
    return config_from_record(record)


def read_generation(source: str) -> dict[str, Any]:
    """Return the content of a folder's or hub id's `generation_config.json`; empty if it has none.

    Raises: ModelError if the file cannot be read.
    """
    path = Path(source).expanduser() / _GENERATION
    if is_checkpoint(source):
        path = Path(tokenizer_of(source)) / _GENERATION
    elif not leads_to_folder(path.parent):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(source, _GENERATION))
        except EntryNotFoundError:  # also raised without a network
            return {}
    try:
        return _read_table(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}", key="from_pretrained") from error


def _check_file(path: Path) -> None:
    """Raises: ValueError for a file that no model has; OSError."""
    if not path.is_file():
        raise ValueError("there is no config.json in it")
    body = _read_table(path)
    if "configuration_files" in body:  # by which transformers would read another file, unchecked
        raise ValueError("it refers to other files by `configuration_files`; remove the key")
    wrong = next(iter(size_problems(body)), None)
    if wrong is not None:
        raise ValueError(f"{wrong[0]} {wrong[1]}")


def _read_table(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model's folder; in the cache of the Hub it is a link. Raises: OSError, ValueError."""
    problem = lfs_problem(path)
    if problem is not None:
        raise ValueError(problem)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    body = parse_json(path.read_bytes())
    if not isinstance(body, dict):
        raise ValueError(f"{path.name} is not a table of keys")
    return body


def _new_model_config(architecture: str | None, given: Mapping[str, Any], *, data: DataShape) -> PretrainedConfig:
    if architecture != ARCHITECTURE:
        return _new_config(architecture, given, data=data)
    check_parts(given)
    parts = {
        name: _new_config(
            given[name]["architecture"],
            {"pad_token_id": data.pad_id} | part_keys(given, name),
            data=replace(data, seq_len=data.seq_len + 1, auto_class="AutoModel"),
        ).to_dict()
        for name in PARTS
    }
    return _new_config(architecture, dict(given) | parts, data=data)


def _new_config(architecture: str | None, given: Mapping[str, Any], *, data: DataShape) -> PretrainedConfig:
    try:
        base = AutoConfig.for_model(architecture)
        names = {base.attribute_map.get(key, key) for key in given}
        padding = _padding_before(architecture, given, data=data)
        derived: dict[str, Any] = {"vocab_size": data.vocab_size, "max_position_embeddings": data.seq_len}
        derived |= {"bos_token_id": data.eot_id, "eos_token_id": data.eot_id, "pad_token_id": padding}
        derived["max_position_embeddings"] += 0 if padding is None else padding + 1
        if data.auto_class == "AutoModelForSeq2SeqLM":
            derived |= _seq2seq_tokens(base, data)
        derived = {
            key: value
            for key, value in derived.items()
            if (hasattr(base, key) or key in ("decoder_start_token_id", "eos_token_id", "bos_token_id"))
            and base.attribute_map.get(key, key) not in names
        }
        return AutoConfig.for_model(architecture, **(derived | dict(given)))
    except ModelError:
        raise
    except Exception as error:  # transformers validates with exceptions of several unrelated classes
        raise PlanError(f"{architecture}: {one_line(error)}", job_key="model.architecture") from error


def _padding_before(architecture: str | None, given: Mapping[str, Any], *, data: DataShape) -> int | None:
    """The padding token from which an architecture counts its positions; None if it counts them from 0.

    Raises: ModelError if there is none.
    """
    if architecture not in COUNTED_FROM_PADDING:
        return None
    padding = given.get("pad_token_id", data.pad_id)
    if isinstance(padding, int) and 0 <= padding < data.vocab_size:
        return padding
    raise ModelError(
        f"{architecture} counts positions from its padding token on, and the tokenizer names none: set "
        "model.pad_token_id to the id of a token that no text has, or take an architecture without, such as bert",
        key="architecture",
    )


def _set_labels(config: PretrainedConfig, data: DataShape, *, given: Mapping[str, Any]) -> None:
    """Give a classifier's config the labels of the data, and the padding token that follows a sequence.

    Decoders classify at the last token that is not padding, so it must be that of the tokenizer; where it has none
    this is the end-of-text token, which no text contains.
    """
    if data.num_labels is not None:
        names = data.label_names or tuple(f"LABEL_{number}" for number in range(data.num_labels))
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.problem_type = data.problem_type
    text = config.get_text_config()
    own = text.pad_token_id if data.pad_id is None or "pad_token_id" in given else data.pad_id
    for part in (config, text):
        part.pad_token_id = data.eot_id if own is None else own


def _seq2seq_tokens(base: PretrainedConfig, data: DataShape) -> dict[str, Any]:
    """The padding token, and the token that a decoder starts with: the padding token as in T5, or the end of text
    where the architecture has it so by default, as BART.

    The longest source has one token more than the row it was made of, if every span of it is a single token.
    """
    start, end = getattr(base, "decoder_start_token_id", None), getattr(base, "eos_token_id", None)
    tokens = {
        "pad_token_id": data.pad_id,
        "decoder_start_token_id": data.eot_id if start is not None and start == end else data.pad_id,
        "max_position_embeddings": data.seq_len + 1,
    }
    return tokens | ({"forced_eos_token_id": data.eot_id} if getattr(base, "forced_eos_token_id", None) else {})


def _with_overrides(base: PretrainedConfig, given: Mapping[str, Any], *, source: str) -> PretrainedConfig:
    """Return a folder's config with keys of the job, validated as a whole."""
    body = base.to_dict()
    own = {base.attribute_map.get(key, key): value for key, value in given.items()}
    for key, value in own.items():
        if isinstance(value, Mapping) and isinstance(body.get(key), dict):
            own[key] = body[key] | dict(value)
    try:
        if "num_hidden_layers" in {key for key in body if own.get(key, body[key]) != body[key]}:
            body = _without_layer_lists(base, body, kept=own)
        return type(base).from_dict(body | own)
    except Exception as error:  # transformers validates with exceptions of several unrelated classes
        raise ModelError(
            f"the config of {source} cannot be used with {', '.join(given)} of the job: {one_line(error)}",
            key="from_pretrained",
        ) from error


def _without_layer_lists(base: PretrainedConfig, body: Mapping[str, Any], *, kept: Iterable[str]) -> dict[str, Any]:
    """Leave out lists with one entry per layer that the config's class derives by itself, such as `layer_types`."""
    count = base.num_hidden_layers
    lists = {key for key, value in body.items() if isinstance(value, list) and len(value) == count} - set(kept)
    bare = {key: value for key, value in body.items() if key not in lists}
    derived = type(base).from_dict(dict(bare)).to_dict()
    return {key: value for key, value in body.items() if key not in lists or derived.get(key) != value}


def _check_attention(config: PretrainedConfig) -> None:
    """Raises: ModelError if the attention is a kernel of the Hub, which is code that would be downloaded."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for chosen in (getattr(part, "_attn_implementation", None) for part in parts):
        if "/" in str(chosen):
            raise ModelError(
                f"attn_implementation {chosen} is code of the Hub, which forge does not execute: choose eager, "
                "sdpa or flash_attention_2",
            )


def _check_taken(config: PretrainedConfig, given: Mapping[str, Any]) -> None:
    """Raises: ModelError if the config has another value than the job gives."""
    for key, value in given.items():
        found = getattr(config, key, value)
        if isinstance(value, (bool, int, float)) and isinstance(found, (bool, int, float)) and found != value:
            problem = f"{type(config).__name__} does not take it: it stays {found}"
            raise ModelError(problem, key=key)


def _config_keys(config: PretrainedConfig) -> set[str]:
    """Return every key that a config's class accepts, including aliases."""
    names = set(config.attribute_map)
    for cls in type(config).__mro__:
        names |= set(getattr(cls, "__annotations__", {}))
        initialiser = vars(cls).get("__init__")
        if initialiser is not None:
            names |= set(inspect.signature(initialiser).parameters)
    names.add("attn_implementation")
    if names & set(COEFFICIENTS):  # an argument of the forward pass alone in Switch Transformers
        names.add("output_router_logits")
    return {name for name in names if not name.startswith("_")} - {"self", "kwargs", "args"}
