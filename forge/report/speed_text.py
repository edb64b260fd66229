"""The plan's lines about what makes a step faster or smaller: each choice with its reason."""

from __future__ import annotations

from forge.plan.plan import DraftPlan
from forge.plan.speed import compile_choice


def speed_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe each choice of `forge.plan.speed`."""
    choice = compile_choice(plan.job, model=plan.model, device=plan.hardware.device)
    return [("compile", f"{'each layer' if choice.is_on else 'nothing'} ({choice.reason})")]
