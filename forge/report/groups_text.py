"""The groups of ranks that a plan has chosen, and where it quantises gradients (qgZ)."""

from __future__ import annotations

from collections.abc import Callable

from forge.plan.plan import DraftPlan
from forge.plan.snapshot_memory import WEIGHT_BYTES
from forge.plan.world_size import WorldSizePlan
from forge.units import format_bytes

_MAX_NUMBERS = 6


def group_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe the groups, the workers without a rank, and where gradients are not quantised."""
    return [*_shard_groups(plan), *_hpz(plan), *_spare(plan), *_qgz(plan)]


def _shard_groups(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe the groups that each hold the whole state; empty where `auto` or `all` has none."""
    wanted = plan.job.training.zero.shard_group_size
    grouped = [world for world in _without_spare(plan) if world.groups.num_shard_groups > 1]
    if not grouped and not isinstance(wanted, int):
        return []
    found = _sizes(plan, grouped, wanted=wanted, key="shard_group_size", size=lambda world: world.shard_group_size)
    return [("shard groups", f"{found}; each group holds all of the state" if grouped else found)]


def _hpz(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe the groups of hpZ; empty where `auto` chose none."""
    wanted = plan.job.training.zero.hpz_partition_size
    grouped = [world for world in _without_spare(plan) if world.groups.hpz_partition_size > 1]
    if not grouped and wanted in ("auto", 1):
        return []
    found = _sizes(
        plan, grouped, wanted=wanted, key="hpz_partition_size", size=lambda world: world.groups.hpz_partition_size
    )
    if not grouped:
        return [("hpZ", found)]
    second = max(_second_copy_bytes(plan, world) for world in grouped)
    return [("hpZ", f"{found}; their second copy of the weights takes {format_bytes(second)} of each")]


def _spare(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe the workers without a rank; empty if there are none."""
    spare = [world for world in plan.worlds if world.num_spare]
    if not spare:
        return []
    most = max(world.num_spare for world in spare)
    where = f"up to {most}, which get no rank, at {_numbers(spare)} workers"
    return [("spare workers", f"{where}: the step of whole groups is estimated to be shorter")]


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


def _sizes(
    plan: DraftPlan,
    grouped: list[WorldSizePlan],
    *,
    wanted: int | str,
    key: str,
    size: Callable[[WorldSizePlan], int],
) -> str:
    """Say which groups are at which numbers of workers, and who chose them."""
    if not grouped:
        listed = " listed" if plan.num_unlisted else ""
        return f"no groups at any{listed} number of workers (training.zero.{key}: {wanted})"
    parts = [
        f"groups of {each} at {_numbers([world for world in grouped if size(world) == each])} workers"
        for each in sorted({size(world) for world in grouped}, reverse=True)
    ]
    without = [world for world in _without_spare(plan) if world not in grouped]
    rest = f"; none at {_numbers(without)}" if without else ""
    rest += f"; {plan.num_unlisted:,} numbers of workers are not listed" if plan.num_unlisted else ""
    how = "by the estimated step" if wanted == "auto" else f"training.zero.{key}: {wanted}"
    return f"{', '.join(parts)}{rest} ({how})"


def _without_spare(plan: DraftPlan) -> list[WorldSizePlan]:
    """Return the numbers of workers at which all get a rank; at the others the groups are those of fewer ranks."""
    return [world for world in plan.worlds if not world.num_spare]


def _second_copy_bytes(plan: DraftPlan, world: WorldSizePlan) -> int:
    width = WEIGHT_BYTES[plan.job.training.precision]
    return width * plan.model.num_parameters // world.groups.hpz_partition_size


def _numbers(worlds: list[WorldSizePlan]) -> str:
    """`8, 16, 24`; of many the first, and `...` and the last."""
    numbers = [f"{world.batch.world_size:,}" for world in worlds]
    if len(numbers) > _MAX_NUMBERS:
        numbers = [*numbers[: _MAX_NUMBERS - 2], "...", numbers[-1]]
    return ", ".join(numbers)
