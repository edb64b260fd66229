"""What makes a step faster or smaller without changing its result, and why each was chosen. Pure.

`auto` in the job is resolved here, from the job, the model and the device; the worker carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass

from forge.config.job import JobSpec
from forge.errors import PlanError
from forge.plan.inputs import ModelInfo

_DROPOUT = "the masks of dropout are drawn for each sample in Python, which cannot be compiled"
_QUANTISED = "layers in 4 bits (model.lora.quantize) call bitsandbytes, which cannot be compiled"
_PARTITIONED = "ZeRO 3 gathers the weights of each module when it is called, which a compiled layer does not do"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedChoice:
    """One choice of the plan."""

    is_on: bool
    reason: str


def compile_choice(job: JobSpec, *, model: ModelInfo, device: str) -> SpeedChoice:
    """Return whether layers are compiled (`training.compile`), and why.

    Args:
        device: `cpu` or `cuda`.
    """
    wanted, problem = job.training.compile, _compile_problem(job, model)
    if wanted == "off":
        return SpeedChoice(is_on=False, reason="training.compile: off")
    if problem is not None:
        return SpeedChoice(is_on=False, reason=problem)
    if wanted == "on":
        return SpeedChoice(is_on=True, reason="training.compile: on")
    if device == "cpu":
        return SpeedChoice(is_on=False, reason="on a CPU by training.compile: on alone")
    return SpeedChoice(is_on=False, reason="not measured on a GPU yet; training.compile: on compiles")


def require_checkpointing(job: JobSpec, model: ModelInfo) -> None:
    """Raises: PlanError if the job asks for activation checkpointing that the model cannot do."""
    wanted, key = job.training.activation_checkpointing, "training.activation_checkpointing"
    if wanted and model.checkpointing_problem is not None:
        raise PlanError(f"{model.checkpointing_problem}; use false", job_key=key)
    if wanted == "selective" and model.selective_problem is not None:
        raise PlanError(f"{model.selective_problem}; use true, which recomputes it", job_key=key)


def require_compilable(job: JobSpec, model: ModelInfo) -> None:
    """Raises: PlanError if the job asks for compiled layers and they cannot be."""
    if job.training.compile == "on" and (problem := _compile_problem(job, model)) is not None:
        raise PlanError(f"{problem}; use auto or off", job_key="training.compile")


def _compile_problem(job: JobSpec, model: ModelInfo) -> str | None:
    if job.training.zero.stage == 3:
        return _PARTITIONED
    if job.model.lora is not None and job.model.lora.quantize != "none":
        return _QUANTISED
    return _DROPOUT if model.has_dropout else None
