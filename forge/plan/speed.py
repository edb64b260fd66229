"""What makes a step faster or smaller without changing its result, and why each was chosen. Pure.

`auto` in the job is resolved here, from the job, the model and the device; the worker carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forge.config.job import JobSpec
from forge.errors import PlanError
from forge.objective.registry import OBJECTIVES
from forge.plan.gpus import FP8_CAPABILITY, Gpu, find_gpu
from forge.plan.inputs import PLAIN_ATTENTION_TOKENS, HardwareInfo, ModelInfo

LIGER_MODELS = frozenset({"gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
"""`model_type` of causal language models of which liger-kernel 0.8.5 replaces layers and forge computes the loss.

Source: `liger_kernel.transformers.monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN`."""
_FLASH = ("flash_attention_2", "flash_attention_3")
SHARED_ATTENTION = "sdpa"
"""How attention is computed where ranks share each sequence."""
_OF_MODEL = "model.attn_implementation"
_MAX_HEAD = 256
"""Source: https://github.com/Dao-AILab/flash-attention, README, "All head dimensions up to 256"."""
_JOINED = frozenset({"causal-lm", "chat", "distillation", "dpo", "ipo", "orpo", "reward"})
"""Objectives that join packed rows into one, in which FlashAttention finds the examples by their lengths
(`forge.objective.causal_lm.is_flash`)."""
_DROPOUT = "the masks of dropout are drawn for each sample in Python, which cannot be compiled"
_QUANTISED = "layers in 4 bits (model.lora.quantize) call bitsandbytes, which cannot be compiled"
_PARTITIONED = "ZeRO 3 gathers the weights of each module when it is called, which a compiled layer does not do"

_EXCHANGED = (
    "ranks that share each sequence divide it in attention at its examples, whose lengths differ in every step: "
    "layers would be compiled again in each"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedChoice:
    """One choice of the plan."""

    is_on: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChoice:
    """How attention may be computed: the first of these that runs on every rank."""

    names: tuple[str, ...]
    """As transformers' `attn_implementation`; none: the model has attention of its own."""
    reason: str


def attention_choice(
    job: JobSpec, *, model: ModelInfo, device: str, sequence_parallel_size: int = 1
) -> AttentionChoice:
    """Return the candidates of `training.attention`, and why these.

    Args:
        device: `cpu` or `cuda`.
        sequence_parallel_size: ranks that share each sequence.
    """
    wanted = job.training.attention
    if job.model.class_reference is not None:
        return AttentionChoice(names=(), reason=f"{model.class_name} has attention of its own")
    if sequence_parallel_size > 1:
        return AttentionChoice(names=(SHARED_ATTENTION,), reason="ranks share each sequence")
    if model.has_dropout:
        return AttentionChoice(names=("eager",), reason="dropout is drawn for each sample")
    if model.sdpa_problem is not None:
        return AttentionChoice(names=("eager",), reason=model.sdpa_problem)
    if model.attention is not None:
        return AttentionChoice(names=(model.attention,), reason=_OF_MODEL)
    if wanted != "auto":
        return AttentionChoice(names=(wanted,), reason=f"training.attention: {wanted}")
    if device == "cpu":
        if job.data.seq_len <= PLAIN_ATTENTION_TOKENS:
            reason = f"on a CPU faster than sdpa up to {PLAIN_ATTENTION_TOKENS} tokens"
            return AttentionChoice(names=("eager",), reason=reason)
        return AttentionChoice(names=("sdpa",), reason="FlashAttention needs a GPU")
    problem = _flash_problem(job, model, device)
    if problem is not None:
        return AttentionChoice(names=("sdpa",), reason=problem)
    return AttentionChoice(names=(*reversed(_FLASH), "sdpa"), reason="the first that runs on every rank")


def shared_attention_problem(job: JobSpec, model: ModelInfo) -> str | None:
    """Return why ranks cannot share sequences with the attention that the job names; None if they can."""
    for key, wanted in (("training.attention", job.training.attention), (_OF_MODEL, model.attention)):
        if wanted not in ("auto", None, SHARED_ATTENTION):
            return f"{key} is {wanted}, and ranks that share each sequence use {SHARED_ATTENTION}"
    return None


def require_attention(job: JobSpec, *, model: ModelInfo, device: str) -> None:
    """Raises: PlanError if the job names an implementation of attention that cannot be."""
    wanted: str = job.training.attention
    key = "training.attention"
    if job.training.sequence_parallel not in ("auto", 1) and (problem := shared_attention_problem(job, model)):
        key = "training.attention" if wanted not in ("auto", SHARED_ATTENTION) else _OF_MODEL
        size = f"training.sequence_parallel: {job.training.sequence_parallel}"
        raise PlanError(f"{problem} ({size}); use {SHARED_ATTENTION}, or sequence_parallel: 1", job_key=key)
    chosen = attention_choice(job, model=model, device=device)
    if wanted == "auto" and chosen.reason == _OF_MODEL:
        wanted, key = chosen.names[0], _OF_MODEL
    if wanted == "auto":
        return
    if chosen.names != (wanted,):
        found = f"so it uses {chosen.names[0]}" if chosen.names else "which this does not change"
        raise PlanError(f"is {wanted}, but {_because(chosen.reason)}, {found}; use auto", job_key=key)
    if wanted not in _FLASH:
        return
    problem = _flash_problem(job, model, device)
    if problem is not None:
        raise PlanError(f"{problem}; use auto or sdpa", job_key=key)


def _because(reason: str) -> str:
    return f"the job gives {reason}" if reason == _OF_MODEL else reason


def _flash_problem(job: JobSpec, model: ModelInfo, device: str) -> str | None:
    """Why FlashAttention cannot be used; None if that is known on the GPUs only."""
    training, lora = job.training, job.model.lora
    if device != "cuda":
        return "FlashAttention needs a GPU"
    if training.precision != "bf16":
        return f"FlashAttention computes in 16 bits, and training.precision is {training.precision}"
    if model.flash_problem is not None:
        return model.flash_problem
    if lora is not None and lora.dropout:
        return "model.lora.dropout is drawn for each row, and FlashAttention joins the rows of a batch"
    if job.data.packing == "examples" and training.objective not in _JOINED:
        return f"packed examples of the objective {training.objective} are kept apart by masks"
    size = head_size(model)
    return None if size <= _MAX_HEAD else f"FlashAttention has heads of up to {_MAX_HEAD}, and these are of {size}"


def head_size(model: ModelInfo) -> int:
    """Return the width of an attention head."""
    return model.attention_width // max(1, model.num_attention_heads)


def compile_choice(job: JobSpec, *, model: ModelInfo, device: str, sequence_parallel_size: int = 1) -> SpeedChoice:
    """Return whether layers are compiled (`training.compile`), and why.

    Args:
        device: `cpu` or `cuda`.
        sequence_parallel_size: ranks that share each sequence.
    """
    wanted = job.training.compile
    problem = _compile_problem(job, model, sequence_parallel_size=sequence_parallel_size)
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
    if job.training.activation_offload and job.model.class_reference is not None:
        problem = f"is for models of transformers; {model.class_name} is a class of the job's own"
        raise PlanError(problem, job_key="training.activation_offload")
    if wanted == "selective" and model.selective_problem is not None:
        raise PlanError(f"{model.selective_problem}; use true, which recomputes it", job_key=key)


def liger_choice(job: JobSpec, *, model: ModelInfo, device: str) -> SpeedChoice:
    """Return whether Liger's kernels are used (`training.liger`), and why.

    Args:
        device: `cpu` or `cuda`.
    """
    wanted, problem = job.training.liger, _liger_problem(job, model, device)
    if wanted is False:
        return SpeedChoice(is_on=False, reason="training.liger: false")
    if problem is not None:
        return SpeedChoice(is_on=False, reason=problem)
    if wanted is True:
        return SpeedChoice(is_on=True, reason="training.liger: true")
    return SpeedChoice(is_on=False, reason="not measured on a GPU yet; training.liger: true uses them")


def require_liger(job: JobSpec, *, model: ModelInfo, device: str) -> None:
    """Raises: PlanError if the job asks for Liger's kernels and they cannot be used."""
    if job.training.liger is True and (problem := _liger_problem(job, model, device)) is not None:
        raise PlanError(f"{problem}; use auto or false", job_key="training.liger")


def _liger_problem(job: JobSpec, model: ModelInfo, device: str) -> str | None:
    if device != "cuda":
        return "Liger's kernels need a GPU"
    if job.model.class_reference is not None:
        return f"{model.class_name} is a class of the job's own"
    if model.architecture not in LIGER_MODELS:
        return f"Liger's kernels are used for {', '.join(sorted(LIGER_MODELS))}, not for {model.architecture}"
    if job.training.compile == "on":
        return "training.compile: on fuses these operations itself"
    return None


def require_fp8(job: JobSpec, *, model: ModelInfo, hardware: HardwareInfo) -> None:
    """Raises: PlanError if the job asks for products in fp8 and they cannot be."""
    if job.training.fp8 and (problem := _fp8_problem(job, model, hardware)) is not None:
        raise PlanError(f"{problem}; use false", job_key="training.fp8")


def _fp8_problem(job: JobSpec, model: ModelInfo, hardware: HardwareInfo) -> str | None:
    """Why products cannot be in fp8; None if they can, or that is known on the GPUs only."""
    if hardware.device != "cuda":
        return "products in fp8 need a GPU"
    gpu = find_gpu(hardware.name)
    if gpu is not None and (problem := fp8_gpu_problem(gpu)) is not None:
        return problem
    if job.training.precision != "bf16":
        return f"products in fp8 have results in bf16, and training.precision is {job.training.precision}"
    if job.model.lora is not None:
        return (
            "with model.lora the weights of linear layers are frozen, and adapters are too narrow to gain from fp8"
        )
    objective = OBJECTIVES.get(job.training.objective)
    if objective is not None and objective.has_reference_model:
        return (
            f"{job.training.objective} compares the model with itself as it was, computed in bf16, so the "
            "rounding of fp8 would be in its loss"
        )
    if model.fp8_layers is None or model.fp8_layers.num_layers == 0:
        others = "".join(f"; {count} {reason}" for reason, count in _left_out(model).items())
        return f"{model.class_name} has no torch.nn.Linear in its repeated layers that can{others}"
    return None


def fp8_gpu_problem(gpu: Gpu) -> str | None:
    """Return why a GPU cannot compute products in fp8; None if it can."""
    if gpu.compute_capability >= FP8_CAPABILITY:
        return None
    needed, has = (".".join(map(str, one)) for one in (FP8_CAPABILITY, gpu.compute_capability))
    return f"products in fp8 need GPUs of compute capability {needed} or above, and {gpu.name} has {has}"


def _left_out(model: ModelInfo) -> Mapping[str, int]:
    return {} if model.fp8_layers is None else model.fp8_layers.left_out


def require_compilable(job: JobSpec, model: ModelInfo) -> None:
    """Raises: PlanError if the job asks for compiled layers and they cannot be."""
    asked = job.training.sequence_parallel
    problem = _compile_problem(job, model, sequence_parallel_size=1 if asked == "auto" else asked)
    if job.training.compile == "on" and problem is not None:
        raise PlanError(f"{problem}; use auto or off", job_key="training.compile")


def _compile_problem(job: JobSpec, model: ModelInfo, *, sequence_parallel_size: int) -> str | None:
    if job.training.zero.stage == 3:
        return _PARTITIONED
    if job.model.lora is not None and job.model.lora.quantize != "none":
        return _QUANTISED
    if sequence_parallel_size > 1:
        return _EXCHANGED
    return _DROPOUT if model.has_dropout else None
