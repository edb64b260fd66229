"""Which ranks share sequences, and which lengths fit: as a plan says it."""

from __future__ import annotations

from collections.abc import Callable

from forge.plan.gpus import find_gpu
from forge.plan.memory import MemoryEstimate
from forge.plan.parameter_groups import groups_of, optimizer_state
from forge.plan.plan import DraftPlan
from forge.plan.rank_groups import NO_GROUPS, asked_groups
from forge.plan.sequence_parallel import (
    MAX_SEARCHED_TOKENS,
    STEP_TOKENS,
    degrees_of_heads,
    longest_sequences,
    position_limit,
    sequence_parallel_problem,
)
from forge.plan.world_size import memory_estimate
from forge.units import counted

_LONGEST = "longest sequence"


def sequence_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe sequence parallelism, or why it does not help a job that does not fit, and the longest sequence."""
    facts = []
    asked = plan.job.training.sequence_parallel
    degrees = sorted({world.batch.sequence_parallel_size for world in plan.worlds})
    if degrees[-1] > 1:
        why = "as a whole one does not fit" if asked == "auto" else f"training.sequence_parallel: {asked}"
        numbers = " or ".join(str(degree) for degree in degrees)
        facts.append(("sequences", f"each is shared by {numbers} ranks, depending on their number ({why})"))
        if any(world.batch.num_spare_ranks for world in plan.worlds):
            spare = "ranks that are too few for a group keep their part of the state and take no sequence"
            facts.append(("spare ranks", spare))
    elif asked == "auto" and any(world.fits is False for world in plan.worlds):
        problem = sequence_parallel_problem(plan.job, plan.model)
        facts += [("sequences", f"ranks cannot share any: {problem}")] if problem is not None else []
    return facts + _lengths(plan)


def _lengths(plan: DraftPlan) -> list[tuple[str, str]]:
    """Give the lengths that fit the memory estimate at the largest number of workers, by the ranks that share one.

    All else is as in the plan: groups of ranks, micro-batches where the job gives their size (else of one
    sequence), teacher and reference.
    """
    memory, world_size = plan.hardware.memory_bytes, plan.worlds[-1].batch.world_size
    if memory is None:
        return []
    if plan.model.activation_bytes_per_row is not None:
        known = f"unknown: the memory of {plan.model.class_name} is measured at data.seq_len alone"
        return [(_LONGEST, known)]
    possible = [degree for degree in degrees_of_heads(plan.job, plan.model) if degree <= world_size]
    most, given = position_limit(plan.job, plan.model), plan.job.training.micro_batch_size
    found = longest_sequences(possible, estimate=_estimate_at(plan), memory_bytes=memory, most=most)
    size = "" if given in ("auto", 1) else f" with micro-batches of {given}"
    workers = counted(world_size, "worker")
    limited = most is not None and any(length > most - degree for degree, length in found.items())
    limit = f"; the model has positions for {most:,}" if limited else ""
    if possible == [1]:
        return [(_LONGEST, f"{_length(1, found[1])} tokens fit at {workers}{size}{limit}")]
    listed = ", ".join(f"{_length(degree, length)} at {degree}" for degree, length in found.items())
    text = f"tokens that fit at {workers}{size}, by ranks that share it: {listed}{limit}"
    return [(_LONGEST, text)]


def _length(degree: int, length: int) -> str:
    if length > MAX_SEARCHED_TOKENS - STEP_TOKENS * degree:
        return f"{length:,} or more"
    return f"{length:,}" if length else "none"


def _estimate_at(plan: DraftPlan) -> Callable[[int, int], MemoryEstimate]:
    """Return the plan's own memory estimate at most workers, of a degree and a length in tokens."""
    job, model, world = plan.job, plan.model, plan.worlds[-1]
    grows_positions = position_limit(job, model) is None
    size = 1 if job.training.micro_batch_size == "auto" else job.training.micro_batch_size
    state = optimizer_state(groups_of(job.training, model))
    groups = world.groups
    is_free = asked_groups(job.training.zero, world_size=world.batch.world_size) is None
    if is_free and plan.hardware.device == "cuda" and find_gpu(plan.hardware.name) is not None:
        groups = NO_GROUPS  # which the plan takes where others do not fit

    def estimate(degree: int, length: int) -> MemoryEstimate:
        other = model.at_length(length, measured_at=job.data.seq_len, grows_positions=grows_positions)
        has_grown = other.trained is not model.trained
        need = memory_estimate(
            job,
            model=other,
            hardware=plan.hardware,
            world_size=world.batch.world_size,
            state=optimizer_state(groups_of(job.training, other)) if has_grown else state,
            teacher=plan.teacher,
            groups=groups,
        )
        return need(micro_batch_size=size, seq_len=length, sequence_parallel_size=degree)

    return estimate
