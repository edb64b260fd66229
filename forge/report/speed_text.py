"""The plan's lines about what makes a step faster or smaller: each choice with its reason."""

from __future__ import annotations

from collections.abc import Callable

from forge.plan.plan import DraftPlan
from forge.plan.speed import attention_choice, compile_choice, liger_choice


def speed_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe each choice of `forge.plan.speed`."""
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
    if plan.job.training.fp8:
        facts.append(("fp8", _fp8_text(plan)))
    facts.append(("attention", _at_degrees(plan, _attention_text)))
    liger = liger_choice(plan.job, model=plan.model, device=plan.hardware.device)
    facts.append(("liger", f"{'fused kernels' if liger.is_on else 'not used'} ({liger.reason})"))
    return [*facts, ("compile", _at_degrees(plan, _compile_text))]


def _attention_text(plan: DraftPlan, *, sequence_parallel_size: int) -> str:
    choice = attention_choice(
        plan.job,
        model=plan.model,
        device=plan.hardware.device,
        sequence_parallel_size=sequence_parallel_size,
    )
    return f"{' or '.join(choice.names) or 'the class'} ({choice.reason})"


def _compile_text(plan: DraftPlan, *, sequence_parallel_size: int) -> str:
    choice = compile_choice(
        plan.job,
        model=plan.model,
        device=plan.hardware.device,
        sequence_parallel_size=sequence_parallel_size,
    )
    return f"{'each layer' if choice.is_on else 'nothing'} ({choice.reason})"


def _at_degrees(plan: DraftPlan, describe: Callable[..., str]) -> str:
    """Describe a choice where ranks share no sequence and where they do, whichever the numbers of workers have."""
    shared = {world.batch.sequence_parallel_size > 1 for world in plan.worlds}
    texts = [describe(plan, sequence_parallel_size=2 if one else 1) for one in sorted(shared)]
    return "; ".join(dict.fromkeys(texts))


def _fp8_text(plan: DraftPlan) -> str:
    """Say which products are in fp8, which are not, and that the forecast does not count it."""
    layers = plan.model.fp8_layers
    assert layers is not None, "forge.plan.speed.require_fp8 refuses it"
    share = layers.num_parameters / plan.model.num_parameters
    text = f"products of {layers.num_layers:,} linear layers, {share:.0%} of the parameters"
    if layers.left_out:
        text += f"; not of {' and '.join(f'{count:,} {reason}' for reason, count in layers.left_out.items())}"
    if not compile_choice(plan.job, model=plan.model, device=plan.hardware.device).is_on:
        text += "; torchao gains with training.compile: on only"
    return f"{text}; not measured on a GPU yet, so the forecast counts bf16 (training.fp8)"
