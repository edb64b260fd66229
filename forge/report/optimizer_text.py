"""Describe the parameter groups of a plan: how many parameters each has, and how they are updated."""

from __future__ import annotations

from forge.plan.parameter_groups import ParameterGroup, groups_of, optimizer_state
from forge.plan.plan import DraftPlan
from forge.units import format_bytes, format_count

_MAX_GROUPS = 8


def optimizer_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Return one row for each group, and one for the state of the optimizer."""
    training, model = plan.job.training, plan.model
    if not model.trained:
        return []
    groups = groups_of(training, model)
    searched = plan.job.search is not None and "training.optimizer.lr" in plan.job.search.space
    rows = [_described(group, lr=training.optimizer.lr, is_searched=searched) for group in groups[:_MAX_GROUPS]]
    rest = groups[_MAX_GROUPS:]
    if rest:
        rates = [training.optimizer.lr * group.lr_factor for group in rest]
        numel = sum(group.numel for group in rest)
        rows.append(
            f"and {len(rest)} more groups with {format_count(numel)} parameters, lr {min(rates):.3g} to "
            f"{max(rates):.3g}"
        )
    state = optimizer_state(groups)
    share = f", of them {format_bytes(state.replicated_bytes)} on every worker" if state.replicated_bytes else ""
    rows.append(f"state of {format_bytes(state.total_bytes)} beside the weights{share}")
    return [("optimizer", row) for row in rows]


def _described(group: ParameterGroup, *, lr: float, is_searched: bool) -> str:
    count = len(group.parameters)
    one, more = ("vector", "vectors") if group.is_vectors else ("matrix", "matrices")
    tensors = f"{count:,} {one if count == 1 else more}"
    algorithm = group.algorithm.removesuffix("-matrix")
    return (
        f"{algorithm}: {format_count(group.numel)} parameters in {tensors}, lr {lr * group.lr_factor:.3g}"
        f"{' (searched)' if is_searched else ''}, weight decay {group.weight_decay:g}"
    )
