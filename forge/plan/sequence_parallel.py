"""How many ranks share each sequence at a world size (Ulysses sequence parallelism).

A degree d divides the activations of a rank by d, and needs attention heads that it divides. It costs nothing in
padding, since d ranks take one sequence where they would take d. At a world size that it does not divide, W mod d
ranks would have no sequence, so a smaller degree may be faster where it fits; the smallest number of positions per
rank and step decides.

Source: DeepSpeed Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from forge.config.job import JobSpec
from forge.config.training import SEQUENCE_PARALLEL_OBJECTIVES
from forge.errors import PlanError
from forge.plan.batch import BatchPlan, plan_batch
from forge.plan.inputs import ModelInfo
from forge.plan.memory import MemoryEstimate, max_micro_batch_size
from forge.plan.speed import shared_attention_problem

_KEY = "training.sequence_parallel"
MAX_SEARCHED_TOKENS = 2**24
"""Longer sequences are not looked at."""
STEP_TOKENS = 64
"""Lengths that are looked at are multiples of this × the degree."""
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


def sequence_parallel_problem(job: JobSpec, model: ModelInfo) -> str | None:
    """Return why no ranks can share a sequence of this job; None if some can."""
    objective = job.training.objective
    if objective not in SEQUENCE_PARALLEL_OBJECTIVES:
        return f"the loss of {objective} needs whole sequences"
    if model.sequence_parallel_problem is not None:
        return model.sequence_parallel_problem
    if not model.num_attention_heads or not model.num_key_value_heads:
        return f"the number of attention heads of {model.class_name} is unknown"
    return shared_attention_problem(job, model)


def possible_degrees(job: JobSpec, model: ModelInfo) -> tuple[int, ...]:
    """Return every degree that divides heads, key-value heads and the sequence, ascending from 1."""
    return tuple(degree for degree in degrees_of_heads(job, model) if job.data.seq_len % degree == 0)


def degrees_of_heads(job: JobSpec, model: ModelInfo) -> tuple[int, ...]:
    """Return every degree that divides heads and key-value heads, ascending from 1: those of any length."""
    if sequence_parallel_problem(job, model) is not None:
        return (1,)
    common = math.gcd(model.num_attention_heads, model.num_key_value_heads)
    return tuple(degree for degree in range(1, common + 1) if common % degree == 0)


def position_limit(job: JobSpec, model: ModelInfo) -> int | None:
    """Return for how many tokens the model has positions, whatever `data.seq_len` is; None if they follow it.

    A new model gets positions for `data.seq_len` (of some encoder-decoders one more), unless the job gives their
    number.
    """
    limit = model.max_seq_len
    if limit is None or job.model.from_pretrained is not None or _has_key(job.model.config_overrides):
        return limit
    return None if limit in (job.data.seq_len, job.data.seq_len + 1) else limit


def _has_key(given: Mapping[str, Any]) -> bool:
    """Whether the job gives the number of positions, of the model or of a part."""
    return any(
        key in _POSITION_KEYS or (isinstance(value, Mapping) and _has_key(value)) for key, value in given.items()
    )


def require_degree(job: JobSpec, model: ModelInfo) -> None:
    """Raises: PlanError if the job's degree does not divide what it must, or is of no use to its model."""
    degree = job.training.sequence_parallel
    if degree in ("auto", 1):
        return
    problem = sequence_parallel_problem(job, model)
    degrees = possible_degrees(job, model)
    if problem is None and degree in degrees:
        return
    if problem is not None:
        raise PlanError(f"is {degree}, but {problem}; use 1", job_key=_KEY)
    assert isinstance(degree, int), "auto has been dealt with"
    sizes = {
        "attention heads": model.num_attention_heads,
        "key-value heads": model.num_key_value_heads,
        "tokens of data.seq_len": job.data.seq_len,
    }
    undivided = " and ".join(f"{count:,} {name}" for name, count in sizes.items() if count % degree)
    possible = ", ".join(str(one) for one in degrees)
    raise PlanError(f"is {degree}, which does not divide the {undivided}; possible are {possible}", job_key=_KEY)


def split_batch(
    job: JobSpec,
    model: ModelInfo,
    *,
    estimate: Callable[..., MemoryEstimate],
    world_size: int,
    memory_bytes: int | None,
) -> BatchPlan:
    """Split the global batch over the ranks of a world size, at the degree that suits it.

    `auto`: the lowest degree that fits, those first that divide the world size; 1 if none fits. A number: this
    degree where it divides the world size; else, of this one and the lower ones that fit, the one with the fewest
    positions per rank and step, and of equal ones the highest.

    Args:
        estimate: `estimate_memory` with all given but `micro_batch_size` and `sequence_parallel_size`.
        memory_bytes: of one worker; None if unknown, and then everything fits.

    Raises: PlanError if there are more workers, or groups of them, than sequences.
    """
    training = job.training

    def split(degree: int) -> BatchPlan:
        needed = partial(estimate, sequence_parallel_size=degree)
        return plan_batch(
            training.global_batch_size,
            world_size=world_size,
            max_micro_batch_size=max_micro_batch_size(training, estimate=needed, memory_bytes=memory_bytes),
            sequence_parallel_size=degree,
        )

    def fits(degree: int) -> bool:
        size = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
        need = estimate(micro_batch_size=size, sequence_parallel_size=degree)
        return memory_bytes is None or need.fits(memory_bytes)

    asked = training.sequence_parallel
    if asked == 1 or world_size == 1 or (asked == "auto" and fits(1)):
        return split(1)
    possible = [degree for degree in possible_degrees(job, model) if degree <= world_size]
    if asked == "auto":
        by_waste = sorted(possible[1:], key=lambda degree: world_size % degree != 0)
        return split(next(filter(fits, by_waste), 1))
    if world_size % asked == 0:
        return split(asked)
    lower = [degree for degree in possible if degree <= asked]
    fed = [degree for degree in lower if world_size // degree <= training.global_batch_size] or lower[-1:]
    splits = [split(degree) for degree in ([degree for degree in fed if fits(degree)] or fed[-1:])]
    return min(splits, key=lambda batch: (_positions(batch), -batch.sequence_parallel_size))


def _positions(batch: BatchPlan) -> float:
    """Sequences, or parts of one, that a rank computes in a step; filling ones too."""
    return batch.micro_batch_size * batch.gradient_accumulation_steps / batch.sequence_parallel_size


def longest_sequences(
    degrees: Sequence[int], *, estimate: Callable[[int, int], MemoryEstimate], memory_bytes: int, most: int | None
) -> dict[int, int]:
    """Return the longest sequence that fits at each degree, by degree.

    Args:
        estimate: memory at a degree and a length in tokens.
        memory_bytes: of one worker.
        most: positions of the model; None if they do not limit it.

    Returns: tokens, a multiple of `STEP_TOKENS` × the degree or as many as the model has positions for; 0 if not
        even the shortest fits.
    """
    limit = min(most or MAX_SEARCHED_TOKENS, MAX_SEARCHED_TOKENS)
    found = {}
    for degree in degrees:
        unit, largest = STEP_TOKENS * degree, limit - limit % degree
        low, high = 0, limit // unit
        if largest and estimate(degree, largest).fits(memory_bytes):
            found[degree] = largest
            continue
        while low < high:
            middle = (low + high + 1) // 2
            if estimate(degree, middle * unit).fits(memory_bytes):
                low = middle
            else:
                high = middle - 1
        found[degree] = low * unit
    return found
