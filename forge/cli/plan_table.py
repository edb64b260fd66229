"""The plan of a job or a search as `forge plan` shows it."""

from __future__ import annotations

from collections.abc import Sequence

from forge.cli import display
from forge.cli.data_view import show_examples
from forge.plan.batch import BatchPlan
from forge.plan.plan import DraftPlan
from forge.plan.world_size import WorldSizePlan
from forge.report.alerts_text import alert_facts
from forge.report.text import headline, plan_facts, search_facts
from forge.units import format_bytes, format_duration

_MAX_SIZES = 16
"""Numbers of workers that are listed one by one."""


def show_plan(plan: DraftPlan, *, to_stderr: bool = False) -> None:
    """Print what a job will do: its size, its facts, batch and memory at every number of workers, and examples."""
    console = display.ERR if to_stderr else display.OUT
    display.headline(plan.job.name, headline(plan), console=console)
    display.facts([*plan_facts(plan), *search_facts(plan), *alert_facts(plan)], console=console)
    columns = ["#workers", "#micro", "#accum.", "#pad", "#weights", "#grads", "#states", "#host", "#~total"]
    rows = []
    hours = {world.world_size: world.hours for world in plan.forecast.worlds} if plan.forecast else {}
    has_groups = any(world.group_size > 1 for world in plan.worlds)
    columns[1:1] = ["#group"] if has_groups else []
    columns += ["#~time"] if hours else []
    shown = _shown(plan.worlds)
    is_shared = any(world.batch.sequence_parallel_size > 1 for world in plan.worlds)
    columns[1:1] = ["#per seq."] if is_shared else []
    for world in shown:
        batch, need = world.batch, world.memory
        rows.append(
            [
                str(batch.world_size),
                *([_ranks_of_sequence(batch)] if is_shared else []),
                *(["none" if world.group_size == 1 else str(world.group_size)] if has_groups else []),
                str(batch.micro_batch_size),
                str(batch.gradient_accumulation_steps),
                str(batch.padding),
                format_bytes(need.weights_bytes),
                format_bytes(need.gradients_bytes),
                format_bytes(need.optimizer_bytes + need.ema_bytes),
                format_bytes(need.host_bytes),
                format_bytes(need.total_bytes),
                *([format_duration(3600 * hours[batch.world_size].likely)] if hours else []),
            ]
        )
    if any(world.fits is False for world in plan.worlds):
        columns.append("")
        rows = [[*row, "" if world.fits else "does not fit"] for row, world in zip(rows, shown, strict=True)]
    if any(world.num_spare for world in shown):
        columns.append("#spare")
        rows = [[*row, str(world.num_spare or "")] for row, world in zip(rows, shown, strict=True)]
    display.table(columns, rows, console=console)
    num_further = len(plan.worlds) - len(shown) + plan.num_unlisted
    if num_further:
        where = "see -o json"
        if plan.num_unlisted:
            where = f"-o json has {len(plan.worlds):,} in all, the others are planned when a generation has them"
        display.message(f"{num_further:,} further numbers of workers: {where}", console=console)
    if plan.view is not None:
        show_examples(plan.view.examples, console=console)


def _ranks_of_sequence(batch: BatchPlan) -> str:
    """How many ranks share each sequence, and how many take none: `2`, or `2 (1 spare)`."""
    spare = f" ({batch.num_spare_ranks} spare)" if batch.num_spare_ranks else ""
    return f"{batch.sequence_parallel_size}{spare}"


def _shown(worlds: Sequence[WorldSizePlan]) -> Sequence[WorldSizePlan]:
    """Return all sizes if they are few; else powers of two, the first, the last, and the first listed that fits."""
    if len(worlds) <= _MAX_SIZES:
        return worlds
    fitting = next((world for world in worlds if world.fits is not False), None)
    return [
        world
        for world in worlds
        if world in (worlds[0], worlds[-1], fitting) or world.batch.world_size.bit_count() == 1
    ]


def show_warnings(plan: DraftPlan) -> None:
    """Print to stderr what was asked for and cannot be had."""
    for warning in plan.warnings:
        display.warning(warning)
