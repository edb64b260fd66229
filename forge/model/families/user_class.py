"""A user-defined model class: `model.class: my_models:TinyMixer`.

The class is an `nn.Module` and follows this interface:

    class TinyMixer(nn.Module):
        def __init__(self, *, vocab_size: int, seq_len: int, width: int = 64) -> None: ...
        def forward(self, input_ids: Tensor) -> Tensor: ...

- The constructor takes the other keys of the `model:` section by name, and `vocab_size`, `seq_len` and `eot_id`
  if it has parameters of these names. It draws the initial weights from torch's generator, which is seeded with
  `training.seed`, and it must not depend on the rank.
- `forward(input_ids: int64[B, T])` returns logits `float[B, T, vocab_size]`; the logits at t may depend on the
  tokens up to t only.
- Optional argument `position_ids: int64[B, T]` of `forward`, needed for `data.packing: examples`: they restart at
  each example of a row, and no example may see another.
- With `from_pretrained` or `init_from` the values of all parameters are those of a checkpoint or of an exported
  state dict, whose names and shapes must be those of the class.
- Optional attributes, for the plan's table: `num_layers`, `hidden_size`.
- Optional method `gradient_checkpointing_enable(gradient_checkpointing_kwargs)`, as in transformers, needed for
  `training.activation_checkpointing`.

FLOPs and activations are measured: one forward pass on the meta device, whose matrix products and saved tensors
are counted. So the class must not read values of tensors to decide what it computes. Every rank builds the whole
model in memory before it is partitioned, also under ZeRO 3.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model.checkpoint_files import open_weights
from forge.model.families.base import BuildOptions, DataShape, parameter_counts
from forge.model.fp8_layers import find_fp8_layers
from forge.model.freeze import freeze_parameters
from forge.model.init import stream
from forge.model.isolation import isolation_problem
from forge.model.look_ahead import looks_ahead
from forge.model.pretrained import PretrainedWeights, some
from forge.model.selective_checkpoint import checkpointing_problem
from forge.plan.inputs import ModelInfo
from forge.user_code import describe_error, load_class

_MAX_PROBE_FLOPS = 5e10
"""Forward FLOPs up to which a model is run when the plan is made: two passes take about a second on one core."""


class UserClassFamily:
    """Any `nn.Module` that maps token ids to logits."""

    def inspect(self, spec: ModelSpec, data: DataShape) -> ModelInfo:
        with torch.device("meta"):
            model = _construct(spec, data)
        freeze_parameters(model, spec.freeze)
        cost = _measure(model, data)
        counts = parameter_counts(model)
        notes: tuple[str, ...] = ()
        if spec.from_pretrained is not None:
            source, unused = spec.from_pretrained, _open(spec, model).unused
            notes = (f"in {source}, but not in the model, so not used: {some(unused)}",) if unused else ()
        num_frozen = counts["num_parameters"] - counts["num_trainable_parameters"]
        return ModelInfo(
            architecture=spec.class_reference or "",
            class_name=type(model).__name__,
            **counts,
            notes=notes,
            num_base_parameters=num_frozen if spec.from_pretrained is not None else 0,
            num_matmul_parameters=cost["flops"] // (2 * data.seq_len),
            num_layers=int(getattr(model, "num_layers", 0)),
            hidden_size=int(getattr(model, "hidden_size", 0)),
            intermediate_size=0,
            attention_width=0,
            vocab_size=data.vocab_size,
            max_seq_len=None,
            has_linear_head=False,
            isolation_problem=isolation_problem(model),
            sequence_parallel_problem=f"{type(model).__name__} is a class of the job's own",
            look_ahead_problem=_look_ahead_problem(spec, data, flops=cost["flops"]),
            activation_bytes_per_row=cost["activation_bytes"],
            checkpointing_problem=checkpointing_problem(model),
            fp8_layers=find_fp8_layers(model).info,
        )

    def build(self, spec: ModelSpec, data: DataShape, *, options: BuildOptions) -> nn.Module:
        generator_state, default_dtype = torch.get_rng_state(), torch.get_default_dtype()
        torch.manual_seed(stream(options.seed, ""))
        torch.set_default_dtype(options.dtype)
        try:
            model = _construct(spec, data)
        finally:
            torch.set_default_dtype(default_dtype)
            torch.set_rng_state(generator_state)
        freeze_parameters(model, spec.freeze)
        if options.sharding is not None:
            options.sharding.partition(model)
        return model

    def open_pretrained(self, spec: ModelSpec, data: DataShape) -> PretrainedWeights:
        with torch.device("meta"):
            return _open(spec, _construct(spec, data))

    def import_classes(self, spec: ModelSpec, data: DataShape) -> None:
        _load(spec)


def _load(spec: ModelSpec) -> type[nn.Module]:
    assert spec.class_reference is not None
    found: type[nn.Module] = load_class(spec.class_reference, base=nn.Module)
    return found


def _open(spec: ModelSpec, model: nn.Module) -> PretrainedWeights:
    """The weights of a checkpoint or an exported state dict, by the names of a model.

    Raises: ModelError, PlanError.
    """
    return PretrainedWeights(open_weights(spec.from_pretrained or ""), model)


def _construct(spec: ModelSpec, data: DataShape) -> nn.Module:
    """Construct the model. Raises: ModelError if the constructor fails or does not accept a key."""
    cls = _load(spec)
    parameters = inspect.signature(cls).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in spec.config_overrides:
        if key not in parameters and not takes_any:
            choices = tuple(sorted(set(parameters) - set(asdict(data))))
            raise ModelError(f"{cls.__name__} takes no argument of this name", key=key, choices=choices)
    given = {key: value for key, value in asdict(data).items() if key in parameters} | spec.config_overrides
    try:
        return cls(**given)
    except Exception as error:
        raise ModelError(f"{cls.__name__} cannot be constructed: {describe_error(error)}", key="class") from error


def _look_ahead_problem(spec: ModelSpec, data: DataShape, *, flops: int) -> str | None:
    """Run a small model twice, and describe it if a position sees later tokens; None for a large one.

    Raises: ModelError if the run fails.
    """
    if flops > _MAX_PROBE_FLOPS:
        return None
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        model = _construct(spec, data).eval()
        tokens = torch.arange(data.seq_len).remainder(data.vocab_size)
        sees = looks_ahead(model, torch.stack([tokens, tokens.flip(0)]))
    except ModelError:
        raise
    except Exception as error:
        problem = f"one forward pass of {spec.class_reference} failed: {describe_error(error)}"
        raise ModelError(problem, key="class") from error
    finally:
        torch.set_rng_state(generator_state)
    return f"in {type(model).__name__} a position sees the tokens after it" if sees else None


def _measure(model: nn.Module, data: DataShape) -> dict[str, int]:
    """Measure the FLOPs and activation bytes of one row. Raises: ModelError if it fails, or gives no logits."""
    tokens = torch.zeros(1, data.seq_len, dtype=torch.int64, device="meta")
    own = {id(parameter) for parameter in model.parameters()}
    kept: dict[tuple[int, Any], int] = {}

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[tensor.untyped_storage()._cdata, tensor.storage_offset()] = tensor.numel() * tensor.element_size()
        return tensor

    model.train()
    name = type(model).__name__
    try:
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            logits: Any = model(tokens)
    except Exception as error:
        raise ModelError(
            f"one forward pass of {name} on the meta device failed: {describe_error(error)}", key="class"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, data.seq_len, data.vocab_size):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"{name}.forward must return logits [B, T, {data.vocab_size}], not {shape}", key="class")
    # The loss keeps the logits in fp32, their softmax and the gradient.
    num_logits = logits.numel()
    return {"flops": int(counter.get_total_flops()), "activation_bytes": sum(kept.values()) + 12 * num_logits}
