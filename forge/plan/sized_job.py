"""The job file of a sized run: a base job with the model, length, batch, rate and machines of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from forge.errors import PlanError
from forge.plan.sizing import SizedRun
from forge.plan.speed import fp8_gpu_problem
from forge.units import format_count

HEADER = "# Written by `forge plan`"
BASE_JOB: Mapping[str, Any] = {
    "name": "sized",
    "model": {"architecture": "llama"},
    "data": {
        "files": "corpus/*.jsonl",
        "tokenizer": {"train": "bpe", "vocab_size": 32768},
        "seq_len": 2048,
        "held_out": "0.1%",
    },
    "training": {"total_steps": 1},
}
"""What the job is made of if no job file is given."""
DEFAULT_VOCAB_SIZE = 32768
"""Of a base job whose tokenizer is loaded and whose model has no `vocab_size`."""
_ARCHITECTURES = frozenset({"llama", "mistral"})
_EVALUATIONS = 20
_WARMUP = "1%"


def vocab_size_of(job: Mapping[str, Any]) -> int:
    """Return the vocabulary of a job, as written. Raises: PlanError if it is no positive number."""
    tokenizer = job["data"].get("tokenizer", {})
    trained = DEFAULT_VOCAB_SIZE if tokenizer.get("from_pretrained") else tokenizer.get("vocab_size", 8192)
    size = job["model"].get("vocab_size", trained)
    if not isinstance(size, int) or size < 1:
        raise PlanError(f"{size!r} is not a number of tokens", job_key="model.vocab_size")
    return size


def require_sizable(job: Mapping[str, Any]) -> None:
    """Raises: PlanError if the size of the job's model cannot be chosen."""
    model = job["model"]
    if model.get("architecture") not in _ARCHITECTURES:
        given = next((f"{key}: {model[key]}" for key in ("architecture", "class") if model.get(key)), "its weights")
        raise PlanError(
            f"the size of the model is given by {given}; a size is chosen for model.architecture llama or mistral",
            job_key="model",
        )
    if (objective := job["training"].get("objective", "causal-lm")) != "causal-lm":
        raise PlanError(f"the laws are of causal language models, not of {objective}", job_key="training.objective")


def sized_job(run: SizedRun, *, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job as plain values.

    The sections of the base stay but for what the size decides: the keys of the model's shape, the length, batch,
    learning rate, warm-up, ZeRO stage, activation checkpointing, precision, the interval of evaluation, and the
    workers and their GPU.

    Raises: PlanError if the base asks for products in fp8, which the GPU cannot compute.
    """
    problem = fp8_gpu_problem(run.machines.gpu) if base["training"].get("fp8") else None
    if problem is not None:
        raise PlanError(f"{problem}; name another GPU with --gpu, or use false", job_key="training.fp8")
    shape = asdict(run.shape)
    if "vocab_size" not in base["model"]:
        del shape["vocab_size"]  # the tokenizer's
    former = base["training"]
    training = {key: value for key, value in former.items() if key not in ("total_steps", "epochs")}
    optimizer = dict(training.get("optimizer", {})) | {"lr": run.learning_rate}
    rows = run.batch.global_batch_size
    steps = -(-run.num_tokens // (rows * run.goal.seq_len))
    training |= {
        "total_tokens": run.num_tokens,
        "global_batch_size": rows,
        "micro_batch_size": "auto",
        "optimizer": optimizer,
        "schedule": dict(training.get("schedule", {"kind": "cosine"})) | {"warmup": _WARMUP},
        "precision": "bf16",
        "zero": {"stage": run.training.zero.stage},
        "activation_checkpointing": run.training.activation_checkpointing,
        "evaluate_every": f"{max(1, steps // _EVALUATIONS)} steps",
    }
    most = run.machines.num_gpus
    resources = dict(base.get("resources", {}))
    resources |= {"workers": most if most == 1 else f"{-(-most // 2)}..{most}", "gpu": run.machines.gpu.name}
    if run.goal.limit.kind == "usd":
        resources["max_usd"] = run.goal.limit.amount
    if run.goal.limit.kind == "hours":
        resources["max_hours"] = run.goal.limit.amount
    size = format_count(run.shape.num_parameters).lower().replace(".", "-")
    return {
        **base,
        "name": f"{str(base['name'])[:38]}-{size}",
        "model": {**base["model"], **shape},
        "training": training,
        "resources": resources,
    }


def left_out_note(base: Mapping[str, Any]) -> str | None:
    """Say which keys of `training.zero` the job of a sized run leaves out; None if there are none."""
    keys = [f"training.zero.{key}" for key in base["training"].get("zero", {}) if key != "stage"]
    if not keys:
        return None
    return f"left out: {', '.join(keys)}; how the state is divided follows from the size and the machines"


def job_comment(run: SizedRun) -> str:
    """Return the lines that say what the file was made for, beginning with `HEADER`."""
    scale, hours = run.scale, run.hours
    lines = [
        f"{HEADER} for {run.goal.limit}: {format_count(scale.num_parameters)} parameters,",
        f"# {format_count(scale.num_tokens)} tokens ({scale.num_tokens / scale.num_parameters:.3g} per parameter)",
        f"# by {run.goal.law.name}.",
        f"# {run.machines.name}: {hours.low:.3g} to {hours.high:.3g} hours of training steps.",
    ]
    return "\n".join(lines) + "\n"
