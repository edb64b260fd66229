"""The plan's lines about what makes a step faster or smaller: each choice with its reason."""

from __future__ import annotations

from forge.plan.plan import DraftPlan
from forge.plan.speed import attention_choice, compile_choice, liger_choice


def speed_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe each choice of `forge.plan.speed`."""
    choice = compile_choice(plan.job, model=plan.model, device=plan.hardware.device)
    facts = []
    if plan.job.training.activation_checkpointing:
        is_selective = plan.job.training.activation_checkpointing == "selective"
        rest = ", but for the results of matrix products and of fused attention" if is_selective else ""
        facts.append(
            ("activations", f"computed again in the backward pass{rest} (training.activation_checkpointing)")
        )
    if plan.job.training.activation_offload:
        is_used = plan.hardware.device == "cuda"
        text = (
            "in host memory until the backward pass" if is_used else "not moved: on a CPU they are in host memory"
        )
        facts.append(("layer inputs", f"{text} (training.activation_offload)"))
    attention = attention_choice(plan.job, model=plan.model, device=plan.hardware.device)
    facts.append(("attention", f"{' or '.join(attention.names) or 'the class'} ({attention.reason})"))
    liger = liger_choice(plan.job, model=plan.model, device=plan.hardware.device)
    facts.append(("liger", f"{'fused kernels' if liger.is_on else 'not used'} ({liger.reason})"))
    return [*facts, ("compile", f"{'each layer' if choice.is_on else 'nothing'} ({choice.reason})")]
