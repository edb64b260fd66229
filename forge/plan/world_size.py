"""The part of a plan that depends on the number of workers: batch, memory, DeepSpeed's settings, groups of ranks.

Groups need a number of ranks that their size divides. At any other number of workers the plan takes the fastest, by
the estimate of `forge.plan.throughput`, of: groups of another size, smaller ones of hpZ (which divides both
numbers), larger shard groups (the next divisor); whole groups alone, which leaves the other workers without a rank;
and no groups. Where no estimate is possible, it takes the groups of another size.
Gradients are quantised (qgZ) at whole machines only.

A plan lists every number of workers of a short range, and of a long one about 16 of each doubling (`listed_sizes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice
from typing import Any

from forge.config.job import JobSpec
from forge.plan.batch import BatchPlan
from forge.plan.cluster_links import cluster_links
from forge.plan.deepspeed_config import deepspeed_config
from forge.plan.gpus import find_gpu
from forge.plan.inputs import HardwareInfo, ModelInfo, TeacherInfo
from forge.plan.memory import MemoryEstimate, estimate_memory
from forge.plan.parameter_groups import OptimizerState
from forge.plan.rank_groups import (
    NO_GROUPS,
    RankGroups,
    asked_groups,
    possible_hpz,
    possible_shard_groups,
    unit_of,
)
from forge.plan.sequence_parallel import split_batch
from forge.plan.snapshot_memory import num_copies_in_memory
from forge.plan.step_work import step_work_of_job
from forge.plan.throughput import Interconnect, estimate_step
from forge.units import Range

LEAST_GAIN = 0.05
"""Share of a step's estimated time that groups or fewer workers must save: they take memory or leave GPUs idle."""

MAX_LISTED = 256
"""A longer range of workers is not listed in full: each agent gets `plan.json`, where a size takes about 2 kB."""
_SIZES_PER_DOUBLING = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSizePlan:
    """The part of a plan that depends on the number of workers."""

    batch: BatchPlan
    memory: MemoryEstimate
    fits: bool | None
    """Whether the memory estimate fits the worker's memory; None if that is unknown."""
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration."""
    groups: RankGroups = NO_GROUPS
    node_group_size: int = 1
    """Consecutive ranks that should be on one node: a group of hpZ or a shard group, the ranks that share a
    sequence, or both."""
    num_spare: int = 0
    """Workers that a generation leaves without a rank if the cluster has room for so many workers, because the step
    of the others alone is estimated to be shorter."""

    @property
    def num_ranks(self) -> int:
        """Ranks of a generation on a cluster with room for so many workers."""
        return self.batch.world_size - self.num_spare

    @property
    def shard_group_size(self) -> int:
        """Ranks among which the state is divided, if its stage divides it."""
        return self.batch.world_size // self.groups.num_shard_groups

    @property
    def group_size(self) -> int:
        """Ranks in a group of either kind; 1: no groups."""
        return self.shard_group_size if self.groups.num_shard_groups > 1 else self.groups.hpz_partition_size


def listed_sizes(workers: Range) -> tuple[int, ...]:
    """Return the numbers of workers that a plan lists, ascending.

    All of at most `MAX_LISTED`. Of more: all up to 32, from there on multiples of 2, from 64 on multiples of 4, and
    so on; and both ends of the range. Powers of two are among them, and neighbours differ by at most 1/16.
    """
    if workers.high - workers.low < MAX_LISTED:
        return tuple(workers)
    sizes, size = [workers.low], 1
    while size < workers.high:
        if size > workers.low:
            sizes.append(size)
        size += max(1, 2 ** (size.bit_length() - 1) // _SIZES_PER_DOUBLING)
    return (*sizes, workers.high)


def plan_world_size(
    job: JobSpec,
    *,
    model: ModelInfo,
    hardware: HardwareInfo,
    world_size: int,
    state: OptimizerState,
    teacher: TeacherInfo | None,
    links: Interconnect | None = None,
) -> WorldSizePlan:
    """Plan one number of workers.

    Args:
        state: of the optimizer; see `optimizer_state`.
        teacher: of a distillation.
        links: between the GPUs; by default assumed, as `cluster_links` says.

    Raises: PlanError if there are more workers than sequences in a batch.
    """
    links = links or cluster_links(None).interconnect
    zero = job.training.zero
    gpu = find_gpu(hardware.name) if hardware.device == "cuda" else None
    job_at = partial(with_quantized_gradients, job, gpus_per_node=links.gpus_per_node)
    split = partial(
        _split,
        job_at,
        model=model,
        gpus_per_node=links.gpus_per_node,
        hardware=hardware,
        state=state,
        teacher=teacher,
    )
    unit = unit_of(zero, gpus_per_node=links.gpus_per_node, can_choose=gpu is not None)

    def seconds(world: WorldSizePlan) -> float:
        assert gpu is not None
        work = step_work_of_job(
            job_at(world_size=world.batch.world_size),
            model=model,
            batch=world.batch,
            state=state,
            gpu=gpu,
            teacher=teacher,
            groups=world.groups,
        )
        return estimate_step(work, gpu=gpu, interconnect=links).total_s

    def best_at(size: int) -> WorldSizePlan:
        plain = partial(split, world_size=size, groups=NO_GROUPS)
        if unit == 1 or size <= unit:  # one group of all ranks is as good as none
            return plain()
        asked = asked_groups(zero, world_size=size)
        if asked is not None:
            return split(world_size=size, groups=asked)
        hpz = possible_hpz(zero, world_size=size, unit=unit)
        options = [split(world_size=size, groups=hpz)] if hpz is not None else []
        found = possible_shard_groups(zero, world_size=size, unit=unit, can_choose=gpu is not None)
        sharded = (split(world_size=size, groups=groups) for groups in found)
        options += islice((world for world in sharded if world.fits is not False), 1)
        if gpu is None:
            return options[0] if options else plain()
        return reduce(partial(_better, seconds=seconds), options, plain())

    best, whole = best_at(world_size), world_size - world_size % unit
    if gpu is None or whole in (0, world_size) or whole < job.resources.workers.low:
        return best
    is_better = _better(best, fewer := best_at(whole), seconds=seconds) is fewer
    return replace(best, num_spare=world_size - whole) if is_better else best


def memory_estimate(
    job: JobSpec,
    *,
    model: ModelInfo,
    hardware: HardwareInfo,
    world_size: int,
    state: OptimizerState,
    teacher: TeacherInfo | None,
    groups: RankGroups,
) -> Callable[..., MemoryEstimate]:
    """Return `estimate_memory` of a job, with all given but `micro_batch_size` and `sequence_parallel_size`."""
    return partial(
        estimate_memory,
        model,
        job.training,
        world_size=world_size,
        seq_len=job.data.seq_len,
        is_on_host=hardware.device == "cpu",
        state=state,
        num_copies=num_copies_in_memory(engine=job.resources.engine, world_size=world_size),
        has_standby=job.resources.engine == "elastic",
        teacher=teacher,
        holds_reference=job.holds_reference,
        groups=groups,
    )


def with_quantized_gradients(job: JobSpec, *, world_size: int, gpus_per_node: int) -> JobSpec:
    """Return the job without qgZ where DeepSpeed cannot form its groups, the GPUs of each machine.

    It can at up to one machine of workers, where it quantises nothing, and at whole machines. A generation whose
    nodes have other numbers of GPUs than planned leaves qgZ out as well (`forge.train.quantized_gradients`).

    Source: deepspeed.utils.groups._get_local_all_to_all_group, which fails between one machine and two, and leaves
    the last ranks without a group above.
    """
    zero = job.training.zero
    if not zero.quantized_gradients or world_size <= gpus_per_node or world_size % gpus_per_node == 0:
        return job
    zero = zero.model_copy(update={"quantized_gradients": False})
    return job.model_copy(update={"training": job.training.model_copy(update={"zero": zero})})


def _better(
    one: WorldSizePlan, other: WorldSizePlan, *, seconds: Callable[[WorldSizePlan], float]
) -> WorldSizePlan:
    """Return the other if it fits and its steps are clearly shorter, or if it alone fits; else the one."""
    if one.fits is False or other.fits is False:
        return other if other.fits is not False else one
    return other if seconds(other) < (1 - LEAST_GAIN) * seconds(one) else one


def _split(
    job_at: Callable[..., JobSpec],
    *,
    model: ModelInfo,
    hardware: HardwareInfo,
    world_size: int,
    state: OptimizerState,
    teacher: TeacherInfo | None,
    groups: RankGroups,
    gpus_per_node: int,
) -> WorldSizePlan:
    """Plan one number of workers with given groups."""
    job = job_at(world_size=world_size)
    estimate = memory_estimate(
        job, model=model, hardware=hardware, world_size=world_size, state=state, teacher=teacher, groups=groups
    )
    batch = split_batch(job, model, estimate=estimate, world_size=world_size, memory_bytes=hardware.memory_bytes)
    need = estimate(micro_batch_size=batch.micro_batch_size, sequence_parallel_size=batch.sequence_parallel_size)
    return WorldSizePlan(
        batch=batch,
        memory=need,
        fits=None if hardware.memory_bytes is None else need.fits(hardware.memory_bytes),
        deepspeed=deepspeed_config(job.training, batch, groups=groups),
        groups=groups,
        node_group_size=_node_group_size(groups, batch=batch, gpus_per_node=gpus_per_node),
    )


def _node_group_size(groups: RankGroups, *, batch: BatchPlan, gpus_per_node: int) -> int:
    """Return how many consecutive ranks should be on one node, so that groups of each kind are on one.

    If a node has too few GPUs for that, it is the ranks that share a sequence: computation does not hide their
    exchanges, whereas weights are gathered ahead.
    """
    degree, size = batch.sequence_parallel_size, groups.hpz_partition_size
    if groups.num_shard_groups > 1:
        size = min(batch.world_size // groups.num_shard_groups, gpus_per_node)
    both = math.lcm(size, degree)
    return both if degree == 1 or both <= gpus_per_node else degree
