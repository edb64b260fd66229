"""LoRA adapters of several runs over one model, chosen by name for each text of a batch.

The model keeps its own weights. A hook adds to the output of an adapted linear layer, for the tokens of each
adapter, `scale * B(A x)`; the tokens of other texts are not touched.

Source: arXiv 2106.09685; scaling alpha / sqrt(rank) of rsLoRA: arXiv 2312.03732.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from forge.checkpoint.adapter_config import adapter_config_from_record
from forge.checkpoint.best import open_verified
from forge.checkpoint.peft_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from forge.checkpoint.storage import open_storage
from forge.errors import ArgumentError
from forge.foreign import parse_object, read_file
from forge.inference.weights import CheckpointWeights
from forge.model.adapter_names import is_adapter
from forge.process import one_line
from forge.runs.reader import read_plan

_MAX_CONFIG_BYTES = 2**20
_UNSERVED = (
    "use_dora",
    "target_parameters",
    "modules_to_save",
    "alpha_pattern",
    "rank_pattern",
    "layer_replication",
)
_PAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankUpdate:
    """What an adapter adds to a linear layer: `scale * up(down(x))`."""

    down: Tensor
    """[rank, inputs]"""
    up: Tensor
    """[outputs, rank]"""
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """The adapters of one run, by the full name of the linear layer that they belong to."""

    source: str
    layers: Mapping[str, LowRankUpdate]
    base_digest: str | None
    """`LoadedModel.digest` of the model that they were trained on; None if it is not recorded."""


def load_adapters(source: str | Path, *, step: int | str | None = None, ema: bool = False) -> AdapterWeights:
    """Read the adapters of a run's checkpoint, or of a folder of peft such as `forge checkpoints export` writes.

    Raises: ArgumentError if the source holds no adapters or such as can only be merged; CheckpointError.
    """
    folder = Path(source)
    if (folder / "plan.json").is_file():
        return _of_run(folder, step=step, ema=ema)
    if step is not None or ema or not (folder / CONFIG_FILE).is_file():
        raise ArgumentError(f"{folder} is neither a run nor a folder of adapters ({CONFIG_FILE})")
    return _of_folder(folder)


class ServedAdapters:
    """Named adapters over one model.

    Raises: ArgumentError if they do not belong to the model.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, AdapterWeights], *, digest: str | None) -> None:
        self.names = frozenset(adapters)
        self._selected: ContextVar[Mapping[str, Tensor] | None] = ContextVar("forge_adapters", default=None)
        self._device = next(model.parameters()).device
        modules = dict(model.named_modules())
        updates: dict[str, dict[str, LowRankUpdate]] = {}
        for name, adapter in adapters.items():
            if None not in (digest, adapter.base_digest) and digest != adapter.base_digest:
                raise ArgumentError(f"the adapters of {adapter.source} were trained on other weights than these")
            for layer, update in adapter.layers.items():
                updates.setdefault(layer, {})[name] = _placed(update, modules.get(layer), name=layer)
        for layer, named in updates.items():
            modules[layer].register_forward_hook(self._hook(named))

    @contextmanager
    def using(self, tokens: Sequence[str | None]) -> Iterator[None]:
        """Use an adapter for each token of the batches that this thread computes; None: the model alone."""
        indices = {
            name: torch.tensor([at for at, one in enumerate(tokens) if one == name], device=self._device)
            for name in dict.fromkeys(tokens)
            if name is not None
        }
        token = self._selected.set(indices)
        try:
            yield
        finally:
            self._selected.reset(token)

    def _hook(self, updates: Mapping[str, LowRankUpdate]) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for name, index in (self._selected.get() or {}).items():
                update = updates.get(name)
                if update is not None:
                    # A multiple of _PAD tokens, so that the bits of a token do not depend on the others.
                    padded = torch.cat([index, index[:1].expand(-len(index) % _PAD)])
                    added = inputs[0].flatten(0, -2)[padded] @ update.down.T @ update.up.T
                    output.view(-1, output.shape[-1]).index_add_(0, index, added[: len(index)], alpha=update.scale)

        return add


@torch.no_grad()
def merge_adapters(model: nn.Module, adapter: AdapterWeights, *, digest: str) -> str:
    """Add an adapter's update to the weights of a model in fp32: `W + scale * B A`.

    Args:
        digest: of the model (`LoadedModel.digest`).

    Returns: the new digest.
    Raises: ArgumentError if the adapter does not belong to the model.
    """
    if adapter.base_digest not in (None, digest):
        raise ArgumentError(f"the adapters of {adapter.source} were trained on other weights than these")
    modules, state = dict(model.named_modules()), hashlib.sha256(digest.encode())
    for layer in sorted(adapter.layers):
        module = modules.get(layer)
        update = _placed(adapter.layers[layer], module, name=layer)
        assert module is not None, "checked by _placed"
        added, weight = update.scale * (update.up @ update.down), module.weight
        weight += added if added.shape == weight.shape else added.T
        for part in (update.down, update.up):
            state.update(f"{layer} {tuple(part.shape)} {update.scale}".encode() + part.cpu().numpy().tobytes())
    return state.hexdigest()


def _placed(update: LowRankUpdate, module: nn.Module | None, *, name: str) -> LowRankUpdate:
    weight: Any = getattr(module, "weight", None)
    shape = (update.up.shape[0], update.down.shape[1])
    if weight is None or shape not in (tuple(weight.shape), tuple(weight.shape)[::-1]):  # Conv1D stores the reverse
        raise ArgumentError(f"the model has no linear layer {name} of {shape[1]} inputs and {shape[0]} outputs")
    return LowRankUpdate(down=update.down.to(weight), up=update.up.to(weight), scale=update.scale)


def _of_run(folder: Path, *, step: int | str | None, ema: bool) -> AdapterWeights:
    plan = read_plan(folder)
    checkpoint = open_verified(open_storage(plan.job.checkpoint.url_of(str(folder))), step=step)
    shape = checkpoint.shape
    if not shape.adapters:
        raise ArgumentError(f"{folder} holds no adapters: its job has no model.lora")
    config = adapter_config_from_record(shape.adapters)
    trained = [name for name, one in shape.parameters.items() if one.kind == "master"]
    beyond = [name for name in trained if not is_adapter(name)]
    if config.use_dora or config.parameters or beyond:
        kind = "DoRA" if config.use_dora else (*config.parameters, *beyond)[0]
        raise ArgumentError(f"{folder} has adapters that can only be merged ({kind}): export it and serve that")
    weights = CheckpointWeights(checkpoint, ema=ema, needs_base=False)
    tensors = {
        name: torch.cat(list(weights.pieces(name, max_numel=2**62))).view(shape.parameters[name].shape)
        for name in trained
    }
    files = None if shape.base is None else json.dumps(dict(shape.base.files), sort_keys=True)
    digest = None if files is None else hashlib.sha256(files.encode()).hexdigest()
    scale = config.alpha / (config.rank**0.5 if config.use_rslora else config.rank)
    return AdapterWeights(
        source=str(folder), layers=_paired(tensors, scale=scale, source=folder), base_digest=digest
    )


def _of_folder(folder: Path) -> AdapterWeights:
    try:
        body = parse_object(read_file(folder / CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArgumentError(f"the adapters of {folder} cannot be read: {one_line(error)}") from error
    beyond = [key for key in _UNSERVED if body.get(key)]
    if body.get("peft_type") != "LORA" or body.get("bias", "none") != "none" or beyond:
        what = beyond[0] if beyond else f"{body.get('peft_type')}, bias {body.get('bias')}"
        raise ArgumentError(f"{folder} has adapters that can only be merged ({what}): merge them and serve that")
    rank, alpha = body.get("r"), body.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise ArgumentError(f"{folder / CONFIG_FILE} names no rank and scale: r {rank}, lora_alpha {alpha}")
    scale = alpha / (rank**0.5 if body.get("use_rslora") else rank)
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return AdapterWeights(source=str(folder), layers=_paired(plain, scale=scale, source=folder), base_digest=None)


def _paired(tensors: Mapping[str, Tensor], *, scale: float, source: Path) -> dict[str, LowRankUpdate]:
    layers = {}
    for name, down in tensors.items():
        layer, is_down, _ = name.partition(".lora_A.weight")
        up = tensors.get(f"{layer}.lora_B.weight")
        if is_down and up is not None and down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]:
            layers[layer] = LowRankUpdate(down=down, up=up, scale=float(scale))
    if not layers or 2 * len(layers) != len(tensors):
        raise ArgumentError(f"{source} holds {len(tensors)} weights of which only {2 * len(layers)} are adapters")
    return layers
