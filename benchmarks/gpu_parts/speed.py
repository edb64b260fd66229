"""Speed, memory and recovery on one GPU: the measurements of `benchmarks.gpu`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.ranks import Ran, Setting, make_job_plan, run, run_until_killed
from benchmarks.memory import resident_bytes
from benchmarks.report import cpu_model
from benchmarks.torchrun import run_under_torchrun
from forge.events import CheckpointSaved
from forge.limits import usable_memory_bytes
from forge.plan.plan import Plan
from forge.plan.snapshot_memory import num_copies_in_memory
from forge.train.peak import measure_gemm_flops

_PACKAGES = (
    *("torch", "deepspeed", "transformers", "numpy", "pydantic", "triton", "accelerate"),
    *("torchao", "liger-kernel", "flash-attn", "ray", "wandb"),
)
_COPY_BYTES = 2 * 2**30
_COPIES = 10
_SPEEDS = "speeds.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A model, its sequences, and the vocabulary."""

    name: str
    model: Mapping[str, Any]
    vocab_size: int
    seq_len: int
    batch: int = 8


_GPT2 = Sized(
    name="GPT-2 124M",
    model={"architecture": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12},
    vocab_size=50304,
    seq_len=1024,
)
LLAMA = Sized(
    name="Llama 1.1B",
    model={
        "architecture": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    vocab_size=32000,
    seq_len=2048,
)
_TINY = Sized(
    name="tiny GPT-2",
    model={"architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    vocab_size=512,
    seq_len=32,
    batch=2,
)
TINY_LLAMA = Sized(
    name="tiny Llama",
    model={
        "architecture": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    vocab_size=512,
    seq_len=32,
    batch=2,
)
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def environment(setting: Setting) -> Iterator[dict[str, Any]]:
    """Versions, the GPU, its measured rates, and which optional packages are there."""
    installed = {name: _version(name) for name in _PACKAGES}
    yield {"python": platform.python_version(), "cpu": cpu_model(), "memory_gib": usable_memory_bytes() / 2**30}
    yield {"packages": installed}
    if setting.device == "cpu":
        yield {"gpu": "skipped: no CUDA device is used"}
        return
    gpu = torch.cuda.get_device_properties(0)
    yield {
        "gpu": gpu.name,
        "gpu_memory_gib": gpu.total_memory / 2**30,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "driver": _driver(),
    }
    yield {"bf16_gemm_tflops": measure_gemm_flops("cuda", dtype=torch.bfloat16) / 1e12}
    yield {"pinned_copy_to_host_gb_per_s": _copy_to_host_bytes_per_s() / 1e9}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def _copy_to_host_bytes_per_s() -> float:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_COPIES):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return _COPIES * _COPY_BYTES / (time.perf_counter() - began)


def throughput(setting: Setting) -> Iterator[dict[str, Any]]:
    """Tokens per second and MFU of forge at its defaults."""
    found = {}
    for sized in _sizes(setting):
        steps, warm_up = _lengths(setting)
        plan = sized_plan(setting, sized, total_steps=warm_up + steps + 1)
        ran = run(setting, plan, to=f"speed {sized.name}")
        tokens_per_s = sized.batch * sized.seq_len / ran.mean_step_s(warm_up=warm_up)
        found[sized.name] = {"tokens_per_s": tokens_per_s, "peak_flops": ran.started.peak_flops}
        (Path(setting.folder) / _SPEEDS).write_text(json.dumps(found))
        speed = _speed(tokens_per_s, plan=plan, peak=ran.started.peak_flops)
        yield {f"{sized.name}, forge": speed | {"memory": _memory(plan, ran)}}


def forge_speeds(setting: Setting) -> dict[str, dict[str, float]]:
    """Return what `throughput` has measured in this run, by the model's name."""
    path = Path(setting.folder) / _SPEEDS
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def peers(setting: Setting) -> Iterator[dict[str, Any]]:
    """Those of its peers on the same batch, by the same clock: the time of all steps after the warm-up."""
    found = forge_speeds(setting)
    for sized in _sizes(setting):
        if sized.name in found:
            yield from _peers(setting, sized, **found[sized.name])
        else:
            yield {sized.name: "skipped: the part `throughput` has no figure of forge"}


def _sizes(setting: Setting) -> tuple[Sized, ...]:
    return (_TINY,) if setting.smallest else (_GPT2, LLAMA)


def _lengths(setting: Setting) -> tuple[int, int]:
    """Steps that are measured, and steps before them."""
    return (3, 1) if setting.smallest else (12, 4)


def _peers(setting: Setting, sized: Sized, *, tokens_per_s: float, peak_flops: float) -> Iterator[dict[str, Any]]:
    steps, warm_up = _lengths(setting)
    plan = sized_plan(setting, sized, total_steps=warm_up + steps + 1)
    own = {key: value for key, value in sized.model.items() if key != "architecture"}
    request = {
        "model": {"model_type": sized.model["architecture"], **own, **_no_dropout(sized)},
        "vocab_size": sized.vocab_size,
        "seq_len": sized.seq_len,
        "micro_batch_size": sized.batch,
        "lr": 1e-3,
        "warm_up": warm_up,
        "steps": steps,
        "fused": True,
        "attention": "sdpa",
        "deepspeed": False,
    }
    programs = {
        "bare DeepSpeed": "deepspeed_loop",
        "Trainer": "hf_trainer",
        "plain PyTorch, compiled": "plain_loop",
    }
    for name, module in programs.items():
        if module == "hf_trainer" and importlib.util.find_spec("accelerate") is None:
            yield {f"{sized.name}, {name}": "skipped: accelerate is not installed"}
            continue
        try:
            output = run_under_torchrun(module, world_size=1, request=request, stdout=subprocess.PIPE)
        except subprocess.SubprocessError as error:  # its stderr is in the part's log
            yield {f"{sized.name}, {name}": f"failed: {type(error).__name__}"}
            continue
        speed = _speed(json.loads(output.splitlines()[-1])["tokens_per_s"], plan=plan, peak=peak_flops)
        yield {f"{sized.name}, {name}": speed | {"forge_ratio": tokens_per_s / speed["tokens_per_s"]}}


def _speed(tokens_per_s: float, *, plan: Plan, peak: float) -> dict[str, Any]:
    return {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * plan.flops_per_token / peak}


def _no_dropout(sized: Sized) -> Mapping[str, float]:
    return _NO_DROPOUT if sized.model["architecture"] == "gpt2" else {}


def sized_plan(
    setting: Setting, sized: Sized, *, checkpoint: Mapping[str, Any] | None = None, **training: Any
) -> Plan:
    """Plan a job on one batch of a model.

    Args:
        training: keys of the job's section.
    """
    batch = {"global_batch_size": sized.batch, "micro_batch_size": sized.batch}
    return make_job_plan(
        setting,
        model={**sized.model, **_no_dropout(sized)},
        training={**batch, **training},
        checkpoint=checkpoint,
        vocab_size=sized.vocab_size,
        seq_len=sized.seq_len,
    )


def memory(setting: Setting) -> Iterator[dict[str, Any]]:
    """Peak memory of one rank against the plan's estimate."""
    sized = _TINY if setting.smallest else _GPT2
    configurations: dict[str, dict[str, Any]] = {
        "ZeRO 1": {"zero": {"stage": 1}},
        "ZeRO 3": {"zero": {"stage": 3}},
        "plain loss": {"cross_entropy": "plain"},
        "recomputed": {"activation_checkpointing": True},
        "fp32": {"precision": "fp32"},
        "EMA": {"ema": {"decay": 0.99}},
    }
    for name, changes in list(configurations.items())[: 1 if setting.smallest else None]:
        plan = sized_plan(setting, sized, total_steps=3, **changes)
        yield {name: _memory(plan, run(setting, plan, to=f"memory {name}"))}


def _memory(plan: Plan, ran: Ran) -> dict[str, float]:
    need = plan.for_world_size(1).memory
    copies = num_copies_in_memory(engine=plan.job.resources.engine, world_size=1)
    estimate = resident_bytes(need, num_copies=copies) if need.is_on_host else need.total_bytes - need.standby_bytes
    measured = max(metrics.peak_memory_gib for metrics in ran.steps)
    return {"measured_gib": measured, "estimate_gib": estimate / 2**30, "error": estimate / 2**30 / measured - 1}


def state(setting: Setting) -> Iterator[dict[str, Any]]:
    """What a snapshot at every step costs, and how long a checkpoint stops training."""
    sized = _TINY if setting.smallest else _GPT2
    steps, warm_up = (4, 1) if setting.smallest else (24, 5)
    changes = {"total_steps": steps + warm_up + 1}
    plan = sized_plan(setting, sized, checkpoint={"snapshot_every": 1}, **changes)
    seconds = {
        name: run(setting, plan, to=f"state {name}", with_snapshots=name == "every step").step_s(warm_up=warm_up)
        for name in ("never", "every step")
    }
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    yield {"snapshot_overhead": medians["every step"] / medians["never"], "step_s": medians}
    every = sized_plan(
        setting, sized, checkpoint={"every": "2 steps" if setting.smallest else "8 steps"}, **changes
    )
    saved = [
        event for event in run(setting, every, to="state checkpoints").events if isinstance(event, CheckpointSaved)
    ]
    yield {
        f"checkpoint of step {one.step}": {
            "stall_s": one.stall_s,
            "seconds": one.seconds,
            "gib": one.size_bytes / 2**30,
        }
        for one in saved
    }


def kill(setting: Setting) -> Iterator[dict[str, Any]]:
    """SIGKILL one of two ranks that share the device; time until the other one has made the next step, by part."""
    sized = _TINY if setting.smallest else _GPT2
    plan = sized_plan(
        setting,
        sized,
        total_steps=400,
        checkpoint={"every": "2 steps", "snapshot_every": 1},
        zero={"stage": 0},
        micro_batch_size=sized.batch // 2,
    )
    killed = run_until_killed(setting, plan, to="kill", after="step-00000002")
    yield {"notice_s": killed.noticed_at - killed.at}
    after = run(setting, plan, to="kill", stop_after=4)
    yield {
        "kill_to_next_step_s": after.first_step_at - killed.at,
        "parts_s": dict(after.started.seconds),
        "first_step_after": after.steps[0].step,
        "not_measured": "state from memory: it came from a checkpoint",
    }
