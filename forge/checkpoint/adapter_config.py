"""The adapters of a model as its checkpoints record them, read without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from forge.checkpoint.manifest import ModelShape
from forge.errors import ModelError
from forge.foreign import from_record

_MAX_RANK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Which layers of a model have adapters, and which adapters."""

    rank: int
    alpha: float
    dropout: float
    use_dora: bool
    use_rslora: bool
    modules: tuple[str, ...]
    """Full names of the linear layers that have one."""
    parameters: tuple[str, ...]
    """Full names of the weights of experts that have one."""


def adapter_config_from_record(record: Mapping[str, Any]) -> AdapterConfig:
    """The adapters of a checkpoint. Raises: ModelError if the record is not one that forge writes."""
    try:
        found = from_record(AdapterConfig, dict(record))
    except ValueError as error:
        raise ModelError(f"the adapters of the checkpoint cannot be used: {error}") from error
    if not (1 <= found.rank <= _MAX_RANK and 0 <= found.dropout < 1):
        raise ModelError(
            f"the adapters of the checkpoint cannot be used: rank {found.rank}, dropout {found.dropout}"
        )
    return found


def shortest_names(modules: Iterable[str], *, shape: ModelShape) -> tuple[str, ...]:
    """Name modules of a model by their last names, where these select the same modules; else in full."""
    wanted = set(modules)
    ends = sorted({name.rpartition(".")[2] for name in wanted})
    every = {name.rpartition(".")[0] for name in [*shape.parameters, *shape.tied]}
    selected = {name for name in every if name.rpartition(".")[2] in ends}
    return tuple(ends if selected == wanted else sorted(wanted))
