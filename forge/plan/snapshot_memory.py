"""Bytes of a parameter, and host memory that the snapshots of a run take."""

from __future__ import annotations

from forge.config.training import TrainingSpec
from forge.plan.inputs import ModelInfo
from forge.plan.parameter_groups import OptimizerState
from forge.plan.rank_groups import RankGroups, most_parts_per_shard

WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
"""Of a parameter, by `training.precision`."""


def num_copies_in_memory(*, engine: str, world_size: int) -> int:
    """Return how many copies of one rank's state host memory holds.

    Ray Train: one, for checkpoints. Elastic: two alternating snapshot buffers, and as many replicas of another
    node's if there is another node.
    """
    if engine == "ray-train":
        return 1
    return 4 if world_size > 1 else 2


def snapshot_bytes(
    model: ModelInfo,
    training: TrainingSpec,
    *,
    state: OptimizerState,
    num_copies: int,
    world_size: int,
    groups: RankGroups,
) -> int:
    """Of the snapshots that a node keeps for each of its ranks, at every stage; of frozen parameters in their own
    precision, or not at all.

    With shard groups, of its own rank alone, in two buffers: a part of its shard (`most_parts_per_shard`).

    Args:
        num_copies: of one rank's state; see `num_copies_in_memory`.
    """
    frozen = model.num_parameters - model.num_trainable_parameters - model.num_base_parameters
    kept = (8 if training.ema else 4) * model.num_trainable_parameters + state.total_bytes
    kept += WEIGHT_BYTES[training.precision] * frozen
    parts = most_parts_per_shard(groups.num_shard_groups)
    if not parts or num_copies == 1:
        return num_copies * kept // world_size
    return 2 * kept * groups.num_shard_groups // (world_size * parts)
