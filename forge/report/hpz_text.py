"""The groups of hpZ that a plan has chosen, and where it quantises gradients (qgZ)."""

from __future__ import annotations

from forge.plan.memory import WEIGHT_BYTES
from forge.plan.plan import DraftPlan
from forge.plan.world_size import WorldSizePlan
from forge.units import format_bytes

_MAX_NUMBERS = 6


def hpz_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe the groups, the workers without a rank, and where gradients are not quantised."""
    return [*_hpz(plan), *_qgz(plan)]


def _hpz(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe the groups and the workers without a rank; empty at other stages and where `auto` chose none."""
    zero = plan.job.training.zero
    grouped = [world for world in plan.worlds if world.hpz_partition_size > 1]
    spare = [world for world in plan.worlds if world.num_spare]
    if zero.stage != 3 or not (grouped or spare or zero.hpz_partition_size not in ("auto", 1)):
        return []
    facts = [("hpZ", _groups(plan, grouped))]
    if spare:
        most = max(world.num_spare for world in spare)
        facts.append(
            (
                "spare workers",
                f"up to {most}, which get no rank, at {_numbers(spare)} workers: the step of whole groups is "
                "estimated to be shorter",
            )
        )
    return facts


def _qgz(plan: DraftPlan) -> list[tuple[str, str]]:
    """Say at which numbers of workers gradients are not quantised; empty if they are at all, or not wanted."""
    if not plan.job.training.zero.quantized_gradients:
        return []
    without = [w for w in plan.worlds if "zero_quantized_gradients" not in w.deepspeed["zero_optimization"]]
    if not without:
        return []
    return [
        (
            "qgZ",
            f"gradients are not quantised at {_numbers(without)} workers: DeepSpeed needs whole machines, or one "
            "(training.zero.quantized_gradients)",
        )
    ]


def _groups(plan: DraftPlan, grouped: list[WorldSizePlan]) -> str:
    wanted = plan.job.training.zero.hpz_partition_size
    if not grouped:
        return f"no groups at any number of workers (training.zero.hpz_partition_size: {wanted})"
    sizes = sorted({world.hpz_partition_size for world in grouped}, reverse=True)
    parts = [
        f"groups of {size} at {_numbers([world for world in grouped if world.hpz_partition_size == size])} workers"
        for size in sizes
    ]
    without = [world for world in plan.worlds if world.hpz_partition_size == 1]
    rest = f"; none at {_numbers(without)}" if without else ""
    rest += f"; {plan.num_unlisted:,} numbers of workers are not listed" if plan.num_unlisted else ""
    second = max(_second_copy_bytes(plan, world) for world in grouped)
    how = "by the estimated step" if wanted == "auto" else f"training.zero.hpz_partition_size: {wanted}"
    return (
        f"{', '.join(parts)}{rest} ({how}); their second copy of the weights takes {format_bytes(second)} of each"
    )


def _second_copy_bytes(plan: DraftPlan, world: WorldSizePlan) -> int:
    width = WEIGHT_BYTES[plan.job.training.precision]
    return width * plan.model.num_parameters // world.hpz_partition_size


def _numbers(worlds: list[WorldSizePlan]) -> str:
    """`8, 16, 24`; of many the first, and `...` and the last."""
    numbers = [f"{world.batch.world_size:,}" for world in worlds]
    if len(numbers) > _MAX_NUMBERS:
        numbers = [*numbers[: _MAX_NUMBERS - 2], "...", numbers[-1]]
    return ", ".join(numbers)
