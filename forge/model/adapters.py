"""Put LoRA adapters into a transformers model, with the layers of the library peft.

Only this module imports peft, inside its functions: a run without `model.lora` never loads it. The layers are
injected into the model, which stays a model of its own class, so everything that looks for its head or its base
model finds them. The model may be partitioned by ZeRO 3 or be on the meta device, and its weights need no values:
the adapters are built without any, and `forge.model.adapter_weights` supplies them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from forge.checkpoint.adapter_config import AdapterConfig
from forge.config.lora import LoraSpec
from forge.errors import ModelError
from forge.model.adapter_names import ADAPTER_NAME, PARTS, has_adapters, is_adapter, unwrapped_name
from forge.model.adapter_targets import AdapterTargets
from forge.process import one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayer:
    """One adapter in a model, and the weight that it is added to."""

    weight: str
    """Unwrapped name of the weight."""
    prefix: str
    """What the names of its parameters begin with: `PREFIX.lora_A.weight`."""
    scaling: float
    use_dora: bool
    num_experts: int
    """1 for a linear layer."""
    is_transposed: bool
    """Whether the weight is stored as inputs × outputs (GPT-2's Conv1D, some experts)."""

    @property
    def parts(self) -> tuple[str, ...]:
        """peft's modules of the adapter, each with one parameter `weight`."""
        return PARTS if self.use_dora else PARTS[:2]


def adapter_config(spec: LoraSpec, targets: AdapterTargets) -> AdapterConfig:
    """The adapters of a job."""
    return AdapterConfig(
        rank=spec.rank,
        alpha=spec.scaled_alpha,
        dropout=float(spec.dropout),
        use_dora=spec.dora,
        use_rslora=spec.rslora,
        modules=targets.modules,
        parameters=targets.parameters,
    )


def adapter_record(model: nn.Module) -> dict[str, Any]:
    """Describe a model's adapters for its checkpoints; empty if it has none."""
    config: Any = getattr(model, "_forge_adapters", None)
    return {} if config is None else asdict(config)


def require_peft() -> None:
    """Raises: ModelError with the command that installs peft if it is missing."""
    if find_spec("peft") is None:
        raise ModelError("needs the package peft, which is not installed: pip install peft==0.21.2", key="lora")


def add_adapters(model: nn.Module, config: AdapterConfig, *, trained: Sequence[str] = ()) -> None:
    """Put adapters into a model, and freeze every other parameter.

    The adapters have the type of the weights they are added to, and no values yet.

    Args:
        model: its weights may be partitioned, on the meta device, and without values.
        trained: parameters that stay trainable.

    Raises: ModelError if peft is missing or cannot adapt a layer.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    modules = dict(model.named_modules())
    missing = [name for name in config.modules if name not in modules]
    if missing:
        raise ModelError(f"the model has no {missing[0]} to adapt")
    weights = [f"{name}.weight" for name in config.modules] + list(config.parameters)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.modules),
        target_parameters=list(config.parameters) or None,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        init_lora_weights=False,
    )
    # From meta tensors peft learns shapes and computes no values.
    with _as_meta(model, weights) as held, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets `fan_in_fan_out` for Conv1D by itself
        try:
            inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)
        except ValueError as error:  # of a layer that peft has no adapter for
            raise ModelError(f"peft cannot adapt the model: {one_line(error)}", key="lora") from error
    _allocate(model, like=held)
    model._forge_adapters = config  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        plain = unwrapped_name(name)
        parameter.requires_grad_(is_adapter(plain) or plain in trained)


def adapter_layers(model: nn.Module) -> list[AdapterLayer]:
    """List the adapters of a model, in the order of its modules."""
    from peft.tuners.lora import LoraLayer

    found = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        leaf = getattr(module, "parameter_name", "weight")
        num_experts = int(getattr(module, "num_experts", 1))
        swapped = getattr(module, "_did_swap_in_out_features", False)
        found.append(
            AdapterLayer(
                weight=unwrapped_name(f"{name}.base_layer.{leaf}"),
                prefix=name,
                scaling=float(module.scaling[ADAPTER_NAME]),
                use_dora=ADAPTER_NAME in module.lora_magnitude_vector,
                num_experts=num_experts,
                is_transposed=bool(module.fan_in_fan_out) if num_experts == 1 else not swapped,
            )
        )
    return found


def modules_reading_weights(model: nn.Module) -> list[nn.Module]:
    """List the adapters of a model whose forward pass reads weights itself, and not through their own modules.

    ZeRO 3 must gather all weights of such a module before it is called. DoRA reads the weight that it adapts, and
    an adapter of experts adds itself to theirs. Of nested adapters only the outermost is listed.
    """
    found: list[str] = []
    for layer in adapter_layers(model) if has_adapters(model) else ():
        if (layer.use_dora or layer.num_experts > 1) and not any(
            layer.prefix.startswith(f"{outer}.") for outer in found
        ):
            found.append(layer.prefix)
    return [model.get_submodule(name) for name in found]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run a model as if it had no adapters, for the duration of a context.

    peft's own switch also changes which parameters are trained, which DeepSpeed has taken note of.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


@contextmanager
def _as_meta(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Replace parameters by meta tensors of their whole shape for the duration of a context.

    Yields: the parameters by name.
    """
    held: dict[str, nn.Parameter] = {}
    owners = {}
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise ModelError(f"the model has no {path} to adapt") from None
            parameter = module._parameters.get(leaf)
            if parameter is None:
                raise ModelError(f"the model has no {name} to adapt")
            shape = getattr(parameter, "ds_shape", parameter.shape)
            held[name], owners[name] = parameter, (module, leaf)
            meta = torch.empty(shape, dtype=parameter.dtype, device="meta")
            module._parameters[leaf] = nn.Parameter(meta, requires_grad=False)
        yield held
    finally:
        for name, (module, leaf) in owners.items():
            module._parameters[leaf] = held[name]


def _allocate(model: nn.Module, *, like: Mapping[str, nn.Parameter]) -> None:
    """Give the adapters memory, in the type and on the device of the weights that they are added to."""
    for layer in adapter_layers(model):
        weight = like[layer.weight]
        module = model.get_submodule(layer.prefix)
        for part in PARTS:
            if ADAPTER_NAME in getattr(module, part):
                holder = getattr(module, part)[ADAPTER_NAME]
                value = torch.zeros(holder.weight.shape, dtype=weight.dtype, device=weight.device)
                holder._parameters["weight"] = nn.Parameter(value)
