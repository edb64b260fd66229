"""Divide the parameters into groups with one algorithm, learning rate and weight decay each. Pure.

The plan shows the groups and counts their state; the workers build the optimizer from the same groups.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from forge.config.optimizer import OptimizerSpec
from forge.config.parameter_names import matching, near
from forge.config.training import TrainingSpec
from forge.config.yaml_reader import join_key
from forge.errors import PlanError
from forge.plan.inputs import ModelInfo, TrainedParameter

Algorithm = Literal["adamw", "adamw-8bit", "lion", "muon", "adafactor", "adafactor-matrix"]
"""What updates a group; `muon` and `adafactor-matrix` need whole matrices, all others each element by itself."""

BLOCK_8BIT = 256
"""Elements of a parameter that share one scale in bitsandbytes' 8-bit states."""
MIN_NUMEL_8BIT = 4096
"""bitsandbytes' `min_8bit_size`: smaller parameters have states in fp32."""

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_GROUPS_KEY = "training.optimizer.groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that are updated in the same way."""

    algorithm: Algorithm
    lr_factor: float
    """Times the learning rate of the step."""
    weight_decay: float
    is_vectors: bool
    """Whether they have fewer than two dimensions."""
    parameters: tuple[TrainedParameter, ...]

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """Bytes of the optimizer's state beside the master weights."""

    sharded_bytes: int
    """Divided by the world size from ZeRO 1 on."""
    replicated_bytes: int
    """On every rank at every stage."""
    group_numels: tuple[tuple[int, ...], ...] = ()
    """Elements of each trained parameter, by group, in the order of the groups; empty if they are only counted."""

    @property
    def total_bytes(self) -> int:
        """Of a checkpoint, which contains everything once."""
        return self.sharded_bytes + self.replicated_bytes


def parameter_groups(spec: OptimizerSpec, trained: Sequence[TrainedParameter]) -> tuple[ParameterGroup, ...]:
    """Return the groups, first those of matrices; equal for equal parameters.

    Raises: PlanError if a pattern of `groups` matches nothing, two patterns give one parameter different values, or
        no parameter is in a numbered layer for `layer_decay`.
    """
    given = _given(spec, [parameter.name for parameter in trained])
    depths = _lr_depths(spec, trained)
    found: dict[ParameterGroup, list[TrainedParameter]] = {}
    for parameter in sorted(trained, key=lambda parameter: len(parameter.shape) < 2):
        is_vector = len(parameter.shape) < 2
        own = given.get(parameter.name, {})
        lr = own.get("lr")
        group = ParameterGroup(
            algorithm=_algorithm(spec, parameter),
            lr_factor=lr / spec.lr if lr is not None else depths.get(parameter.name, 1.0),
            weight_decay=own.get("weight_decay", 0.0 if is_vector else spec.weight_decay),
            is_vectors=is_vector,
            parameters=(),
        )
        found.setdefault(group, []).append(parameter)
    return tuple(replace(group, parameters=tuple(parameters)) for group, parameters in found.items())


def groups_of(training: TrainingSpec, model: ModelInfo) -> tuple[ParameterGroup, ...]:
    """Return the groups of a job's model; of one whose parameters are only counted, as if they were one vector."""
    counted = TrainedParameter(name="", shape=(model.num_trainable_parameters,))
    return (
        parameter_groups(training.optimizer, model.trained)
        if model.trained
        else (
            ParameterGroup(
                algorithm=_algorithm(training.optimizer, counted),
                lr_factor=1.0,
                weight_decay=0.0,
                is_vectors=True,
                parameters=(counted,),
            ),
        )
    )


def optimizer_state(groups: Sequence[ParameterGroup]) -> OptimizerState:
    """Count the state of all groups."""
    pairs = [(group.algorithm, parameter) for group in groups for parameter in group.parameters]
    return OptimizerState(
        sharded_bytes=sum(_sharded_bytes(algorithm, parameter.numel) for algorithm, parameter in pairs),
        replicated_bytes=sum(
            4 * sum(factor_sizes(parameter.shape)) for name, parameter in pairs if name == "adafactor-matrix"
        ),
        group_numels=tuple(
            tuple(parameter.numel for parameter in group.parameters)
            for group in groups
            if any(parameter.name for parameter in group.parameters)
        ),
    )


@lru_cache(maxsize=1024)
def most_gradients(group_numels: tuple[tuple[int, ...], ...], *, num_shards: int) -> int:
    """Return the elements of the gradients that a rank holds at most between micro-batches at stage 2.

    DeepSpeed divides each group into equal parts, and a rank accumulates the whole gradient of every parameter that
    reaches into its part. Of several groups the largest are added up, though they may be on different ranks.

    Args:
        group_numels: of the trained parameters; see `OptimizerState`.
        num_shards: ranks among which each group is divided.

    Source: DeepSpeed 0.19.8, `independent_gradient_partition_epilogue`, `get_all_grad_tensors`.
    """
    return sum(_most_overlapped(numels, num_parts=num_shards) for numels in group_numels)


def _most_overlapped(numels: Sequence[int], *, num_parts: int) -> int:
    """Of the parameters that overlap one of equal parts, one after the other."""
    ends = list(accumulate(numels))
    starts = [0, *ends[:-1]]
    size = -(-ends[-1] // num_parts)
    most = 0
    for start, end in zip(starts, ends, strict=True):
        # All parts between the first and the last of a parameter overlap it alone.
        for part in {start // size, max(start, end - 1) // size}:
            left, right = bisect_right(ends, part * size), bisect_left(starts, (part + 1) * size)
            most = max(most, ends[right - 1] - starts[left])
    return most


def factor_sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the numbers of row and column means that Adafactor stores of a matrix, or of a batch of matrices."""
    numel = TrainedParameter(name="", shape=shape).numel
    return numel // shape[-1], numel // shape[-2]


def _sharded_bytes(algorithm: Algorithm, numel: int) -> int:
    if algorithm == "adamw-8bit" and numel >= MIN_NUMEL_8BIT:
        return 2 * (numel + 4 * -(-numel // BLOCK_8BIT))
    values = {"adamw": 2, "adamw-8bit": 2, "adafactor-matrix": 0}
    return 4 * values.get(algorithm, 1) * numel


def _algorithm(spec: OptimizerSpec, parameter: TrainedParameter) -> Algorithm:
    is_matrix = len(parameter.shape) >= 2
    if spec.name == "muon":
        return "muon" if is_matrix and parameter.role == "other" else "adamw"
    if spec.name == "adafactor" and is_matrix:
        return "adafactor-matrix"
    return spec.name


def _given(spec: OptimizerSpec, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return what the patterns of `groups` give each parameter; their order does not matter."""
    given: dict[str, dict[str, float]] = {}
    origins: dict[tuple[str, str], str] = {}
    for pattern, group in sorted(spec.groups.items()):
        where = join_key(_GROUPS_KEY, pattern)
        matched = matching(pattern, names) if names else []
        if names and not matched:
            raise PlanError(f"{pattern!r} matches no trained parameter{near(pattern, names)}", job_key=where)
        values = group.model_dump(exclude_none=True)
        for name in matched:
            for key, value in values.items():
                other = origins.setdefault((name, key), pattern)
                if given.setdefault(name, {}).setdefault(key, value) != value:
                    raise PlanError(
                        f"gives {name} another {key} than the pattern {other!r} ({value:g} and "
                        f"{given[name][key]:g}); let only one of them match it",
                        job_key=where,
                    )
    return given


def _lr_depths(spec: OptimizerSpec, trained: Sequence[TrainedParameter]) -> Mapping[str, float]:
    """Return the factor of `layer_decay` of each parameter.

    The first number in a name is the number of its layer, from 0. Of L layers, layer i has the factor
    `decay^(L - 1 - i)`; embeddings have `decay^L`, what comes after the layers has 1.
    """
    if spec.layer_decay is None or not trained:
        return {}
    layers = {
        parameter.name: int(match[1])
        for parameter in trained
        if (match := _LAYER.search(parameter.name)) is not None
    }
    if not layers:
        raise PlanError(
            "no name of a parameter has the number of a layer, such as model.layers.0.weight",
            job_key="training.optimizer.layer_decay",
        )
    num_layers = max(layers.values()) + 1
    return {
        parameter.name: spec.layer_decay ** (num_layers - 1 - layers[parameter.name])
        if parameter.name in layers
        else spec.layer_decay**num_layers
        if parameter.role == "embedding"
        else 1.0
        for parameter in trained
    }
