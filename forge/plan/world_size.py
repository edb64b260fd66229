"""The part of a plan that depends on the number of workers: batch, memory, DeepSpeed's settings, groups of hpZ.

hpZ needs a number of ranks that its group divides. At any other number of workers the plan takes the fastest, by
the estimate of `forge.plan.throughput`, of: a smaller group, which divides both numbers; whole groups alone, which
leaves the other workers without a rank; and no groups. Where no estimate is possible, it takes the smaller group.
Gradients are quantised (qgZ) at whole machines only.

A plan lists every number of workers of a short range, and of a long one about 16 of each doubling (`listed_sizes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from forge.config.job import JobSpec
from forge.plan.batch import BatchPlan
from forge.plan.cluster_links import cluster_links
from forge.plan.deepspeed_config import deepspeed_config
from forge.plan.gpus import find_gpu
from forge.plan.inputs import HardwareInfo, ModelInfo, TeacherInfo
from forge.plan.memory import MemoryEstimate, estimate_memory, num_copies_in_memory
from forge.plan.parameter_groups import OptimizerState
from forge.plan.sequence_parallel import split_batch
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
    hpz_partition_size: int = 1
    """Workers in a group of hpZ; 1: no groups."""
    num_spare: int = 0
    """Workers that a generation leaves without a rank if the cluster has room for so many workers, because the step
    of the others alone is estimated to be shorter."""

    @property
    def num_ranks(self) -> int:
        """Ranks of a generation on a cluster with room for so many workers."""
        return self.batch.world_size - self.num_spare


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
    job_at = partial(with_quantized_gradients, job, gpus_per_node=links.gpus_per_node)
    split = partial(_split, job_at, model=model, hardware=hardware, state=state, teacher=teacher)
    plain = split(world_size=world_size)
    wanted = job.training.zero.hpz_partition_size
    gpu = find_gpu(hardware.name) if hardware.device == "cuda" else None
    if job.training.zero.stage != 3 or wanted == 1 or (wanted == "auto" and gpu is None):
        return plain
    size = links.gpus_per_node if wanted == "auto" else wanted
    if world_size <= size or size == 1:  # one group of all ranks gathers as much as none
        return plain
    if wanted != "auto" and world_size % size == 0:
        return split(world_size=world_size, hpz_partition_size=size)
    common = math.gcd(size, world_size)
    grouped = split(world_size=world_size, hpz_partition_size=common) if common > 1 else plain
    if gpu is None:
        return grouped

    def seconds(world: WorldSizePlan) -> float:
        work = step_work_of_job(
            job_at(world_size=world.batch.world_size),
            model=model,
            batch=world.batch,
            state=state,
            gpu=gpu,
            teacher=teacher,
            hpz_partition_size=world.hpz_partition_size,
        )
        return estimate_step(work, gpu=gpu, interconnect=links).total_s

    best = grouped if _is_better(grouped, plain, seconds=seconds) else plain
    whole = world_size - world_size % size
    if whole == world_size or whole < job.resources.workers.low:
        return best
    fewer = split(world_size=whole)
    if whole > size:
        groups = split(world_size=whole, hpz_partition_size=size)
        fewer = groups if wanted != "auto" or _is_better(groups, fewer, seconds=seconds) else fewer
    is_better = _is_better(fewer, best, seconds=seconds)
    return replace(best, num_spare=world_size - whole) if is_better else best


def with_quantized_gradients(job: JobSpec, *, world_size: int, gpus_per_node: int) -> JobSpec:
    """Return the job without qgZ where DeepSpeed cannot form its groups, the GPUs of each machine.

    It can at up to one machine of workers, where it quantises nothing, and at whole machines.

    Source: deepspeed.utils.groups._get_local_all_to_all_group, which fails between one machine and two, and leaves
    the last ranks without a group above.
    """
    zero = job.training.zero
    if not zero.quantized_gradients or world_size <= gpus_per_node or world_size % gpus_per_node == 0:
        return job
    zero = zero.model_copy(update={"quantized_gradients": False})
    return job.model_copy(update={"training": job.training.model_copy(update={"zero": zero})})


def _is_better(one: WorldSizePlan, other: WorldSizePlan, *, seconds: Callable[[WorldSizePlan], float]) -> bool:
    """Whether one fits and takes clearly shorter steps than the other, or fits and the other does not."""
    if one.fits is False or other.fits is False:
        return one.fits is not False
    return seconds(one) < (1 - LEAST_GAIN) * seconds(other)


def _split(
    job_at: Callable[..., JobSpec],
    *,
    model: ModelInfo,
    hardware: HardwareInfo,
    world_size: int,
    state: OptimizerState,
    teacher: TeacherInfo | None,
    hpz_partition_size: int = 1,
) -> WorldSizePlan:
    """Plan one number of workers with a given group of hpZ."""
    job = job_at(world_size=world_size)
    estimate = partial(
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
        hpz_partition_size=hpz_partition_size,
    )
    batch = split_batch(job, model, estimate=estimate, world_size=world_size, memory_bytes=hardware.memory_bytes)
    need = estimate(micro_batch_size=batch.micro_batch_size, sequence_parallel_size=batch.sequence_parallel_size)
    return WorldSizePlan(
        batch=batch,
        memory=need,
        fits=None if hardware.memory_bytes is None else need.fits(hardware.memory_bytes),
        deepspeed=deepspeed_config(job.training, batch, hpz_partition_size=hpz_partition_size),
        hpz_partition_size=hpz_partition_size,
    )
