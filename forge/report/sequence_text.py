"""Which ranks share sequences, and which lengths fit: as a plan says it."""

from __future__ import annotations

from forge.plan.memory import MemoryEstimate, estimate_memory
from forge.plan.parameter_groups import groups_of, optimizer_state
from forge.plan.plan import DraftPlan
from forge.plan.sequence_parallel import longest_sequences, possible_degrees
from forge.plan.snapshot_memory import num_copies_in_memory


def sequence_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe sequence parallelism, where ranks share sequences or the job does not fit at some number of workers.

    The lengths are those that fit the memory estimate at the largest number of workers, with one sequence in a
    micro-batch, by the number of ranks that share it.
    """
    facts = []
    degrees = sorted({world.batch.sequence_parallel_size for world in plan.worlds})
    if degrees[-1] > 1:
        asked = plan.job.training.sequence_parallel
        why = "as a whole one does not fit" if asked == "auto" else f"training.sequence_parallel: {asked}"
        numbers = " or ".join(str(degree) for degree in degrees)
        facts.append(("sequences", f"each is shared by {numbers} ranks, depending on their number ({why})"))
        if any(world.batch.num_spare_ranks for world in plan.worlds):
            spare = "ranks that are too few for a group keep their part of the state and take no sequence"
            facts.append(("spare ranks", spare))
    if degrees[-1] > 1 or any(world.fits is False for world in plan.worlds):
        facts += _lengths(plan)
    return facts


def _lengths(plan: DraftPlan) -> list[tuple[str, str]]:
    memory, world_size = plan.hardware.memory_bytes, plan.worlds[-1].batch.world_size
    possible = [degree for degree in possible_degrees(plan.job, plan.model) if degree <= world_size]
    if memory is None or len(possible) == 1 or plan.model.activation_bytes_per_row is not None:
        return []
    job, state = plan.job, optimizer_state(groups_of(plan.job.training, plan.model))

    def estimate(degree: int, length: int) -> MemoryEstimate:
        return estimate_memory(
            plan.model.at_length(length, measured_at=job.data.seq_len),
            job.training,
            world_size=world_size,
            micro_batch_size=1,
            seq_len=length,
            is_on_host=plan.hardware.device == "cpu",
            state=state,
            num_copies=num_copies_in_memory(engine=job.resources.engine, world_size=world_size),
            has_standby=job.resources.engine == "elastic",
            sequence_parallel_size=degree,
        )

    longest = longest_sequences(possible, estimate=estimate, memory_bytes=memory, most=plan.model.max_seq_len)
    listed = ", ".join(f"{length:,} at {degree}" for degree, length in longest.items())
    return [("longest sequence", f"tokens that fit at {world_size} workers, by ranks that share it: {listed}")]
