"""`model:` the network that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from forge.config.lora import LoraSpec
from forge.config.section import FieldError, Section, Strings, raise_errors

_ORIGINS = ("architecture", "from_pretrained", "init_from", "class")

_LOADER_ARGUMENTS = frozenset({
    "adapter_kwargs", "auto_map", "cache_dir", "code_revision", "custom_generate", "custom_pipeline", "device_map",
    "force_download", "from_flax", "from_tf", "gguf_file", "kernel_config", "key_mapping", "load_in_4bit",
    "load_in_8bit", "local_files_only", "name_or_path", "offload_folder", "pretrained_model_name_or_path",
    "proxies", "quantization_config", "resume_download", "return_unused_kwargs", "revision", "state_dict",
    "subfolder", "tp_plan", "trust_remote_code", "use_auth_token", "use_kernels", "variant", "weights_only",
})  # fmt: skip
"""Arguments of transformers' loaders, and keys of its configs, that decide which files or code are loaded, and from
where. forge decides that itself: it loads no code of a model's folder or of the Hub, and plain weights only."""

_IMPLEMENTATIONS = frozenset({"attn_implementation", "experts_implementation"})

_MAX_WHOLE = 2**31 - 1
_MAX_LISTED = 2**24
"""Of a number in a list, which may be a count (`attention_types: [[[global], 12]]`) or a token id."""
_MAX_LAYERS = 10_000
"""No model has as many; transformers builds one module for each, also to count them."""
_MAX_LABELS = 1_000_000  # transformers makes a name for each


class ModelSpec(Section):
    """A transformers causal language model: an `architecture` and its config, or pretrained weights."""

    model_config = ConfigDict(extra="allow")

    architecture: str | None = Field(None, min_length=1)
    """Any transformers `model_type` with a causal LM head, such as `llama`, `gpt2` or `qwen3`. All other keys of
    this section are keys of its config (`hidden_size`, `num_hidden_layers`, ...) and are checked against it.
    Weights are initialised from `training.seed`."""

    from_pretrained: str | None = Field(None, min_length=1)
    """A Hugging Face Hub id, or a local folder in its layout: config, safetensors weights and tokenizer are loaded
    from it, and no code. Or one checkpoint of a run, such as `runs/RUN/checkpoints/step-00001000`. All other keys
    of this section change its config: weights that only they add, such as further layers, are drawn from
    `training.seed`; the plan lists them, and those that are not used. A tensor of another shape is an error."""

    init_from: str | None = Field(None, min_length=1)
    """Start from the weights of another run: its id, a unique prefix of it, its folder, or `latest`; or a folder or
    URL of checkpoints, one checkpoint, or an exported folder. Of a run, the best checkpoint is taken or, if no step
    was evaluated, the newest; the plan says which, and the run keeps to it. The run's tokenizer is the default; the
    model is the run's, and other keys change its config, as with `from_pretrained`. Adapters are merged into their
    weights; to go on with them, see `lora.init_from`. Of a run of a `class`, name the class too."""

    resize_embeddings: bool = False
    """Enlarge the embedding and the output head of pretrained weights to the tokenizer's vocabulary, or to
    `vocab_size` if that is given. Each added row is the mean of the existing ones, and is trained."""

    # A field whose name is a keyword of Python has to be declared through the class body's own namespace.
    __annotations__["class"] = "str | None"
    locals()["class"] = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="A class from the folder of `code`, as `module:Class`, such as `my_models:TinyMixer`: an "
        "`nn.Module` whose `forward(input_ids)` returns logits. All other keys of this section are passed to its "
        "constructor, and so are `vocab_size`, `seq_len` and `eot_id` if it takes them. With `init_from` or "
        "`from_pretrained` its weights are those of a checkpoint or of an exported state dict.",
    )

    freeze: Strings = ()
    """Parameters that are not trained: names or glob patterns, such as `model.embed_tokens` or
    `model.layers.[0-9].*`. A pattern also matches everything below the name it matches."""

    lora: LoraSpec | None = None
    """Train adapters, and freeze the weights of `from_pretrained`."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if "model_type" in self.config_overrides:
            raise FieldError("model_type", "forge has another name for this key", nearest="architecture")
        given = [name for name in _ORIGINS if getattr(self, name) is not None]
        if given in (["from_pretrained", "class"], ["init_from", "class"]):
            return self  # the weights of a class
        if self.adapters_from is not None and given not in ([], ["from_pretrained"]):
            problem = f"has weights of its own, of which the adapters are; leave {given[0]} out"
            raise FieldError("lora.init_from", problem, depends_on=(given[0],))
        if len(given) != 1 and self.adapters_from is None:
            raise ValueError("give one of 'architecture', 'from_pretrained', 'init_from' and 'class'")
        return self

    @model_validator(mode="after")
    def _resizes_pretrained_weights(self) -> ModelSpec:
        if self.resize_embeddings and not self.is_pretrained:
            raise FieldError("resize_embeddings", "is for pretrained weights; a new model has the tokenizer's size")
        if self.resize_embeddings and self.class_reference is not None:
            raise FieldError("resize_embeddings", "is for models of transformers", depends_on=("class",))
        return self

    @model_validator(mode="after")
    def _adapts_pretrained_weights(self) -> ModelSpec:
        if self.lora is not None and not self.is_pretrained:
            problem = "adapts frozen pretrained weights, and this model has none: its weights would stay random"
            raise FieldError("lora", f"{problem}; give from_pretrained, or leave lora out")
        if self.lora is not None and self.class_reference is not None:
            raise FieldError("lora", "is for models of transformers", depends_on=("class",))
        if self.lora is not None and self.freeze:
            problem = "has no use beside lora, which freezes every weight of from_pretrained"
            raise FieldError("freeze", f"{problem}; name the layers to adapt in lora.targets", depends_on=("lora",))
        return self

    @model_validator(mode="after")
    def _loads_nothing_else(self) -> ModelSpec:
        # The constructor of a class of the user's own may have arguments of any name.
        if self.class_reference is None:
            given = self.config_overrides
            problems = [*loader_problems(given), *size_problems(given)]
            raise_errors([FieldError(key, problem) for key, problem in problems])
        return self

    @property
    def class_reference(self) -> str | None:
        """The value of the key `class`."""
        reference: str | None = getattr(self, "class")
        return reference

    @property
    def adapters_from(self) -> str | None:
        """`lora.init_from`, if there is a section `lora`."""
        return None if self.lora is None else self.lora.init_from

    @property
    def is_pretrained(self) -> bool:
        """Whether training begins with weights that exist."""
        return bool(self.origins_of_weights)

    @property
    def origins_of_weights(self) -> dict[str, str]:
        """The keys that name weights which exist, with their values."""
        given = {"from_pretrained": self.from_pretrained, "init_from": self.init_from}
        given["lora.init_from"] = self.adapters_from
        return {key: value for key, value in given.items() if value is not None}

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The keys of the transformers config."""
        return dict(self.model_extra or {})


def loader_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the problem of every key of a job that decides what transformers loads.

    Args:
        values: keys of a transformers config, at any depth.
    """
    for key, value in values.items():
        if key in _LOADER_ARGUMENTS or key.startswith("_"):
            yield key, "is an argument of a loader, not a key of the model's config; forge does not pass it on"
        elif key in _IMPLEMENTATIONS and "/" in repr(value):
            yield (
                key,
                "names code of the Hub, which forge does not execute: choose eager, sdpa or flash_attention_2",
            )
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", problem) for inner, problem in loader_problems(value))


def size_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the problem of every size that no model has, and that would take for ever to count.

    Args:
        values: keys of a transformers config, of a job or of a `config.json`.
    """
    for key, value in values.items():
        limit = _MAX_LAYERS if "layer" in key else _MAX_LABELS if key == "num_labels" else _MAX_WHOLE
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", problem) for inner, problem in size_problems(value))
        elif isinstance(value, int) and abs(value) > limit:
            yield key, f"must be at most {limit}"
        elif isinstance(value, list | tuple):
            inside = {f"[{number}]": item for number, item in enumerate(value)}
            most = min(limit, _MAX_LISTED)
            wrong = [inner for inner, item in inside.items() if isinstance(item, int) and abs(item) > most]
            yield from ((f"{key}{inner}", f"must be at most {most}") for inner in wrong[:1])
            nested = {inner: item for inner, item in inside.items() if isinstance(item, Mapping | list | tuple)}
            yield from ((f"{key}{inner}", problem) for inner, problem in size_problems(nested))
