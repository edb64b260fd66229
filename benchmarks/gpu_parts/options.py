"""What the options that `auto` does not choose yet gain on a GPU: the part `options` of `benchmarks.gpu`.

`training.compile`, `training.liger` and `training.fp8` are off by default until this part has shown a gain.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu_parts.ranks import Setting, run
from benchmarks.gpu_parts.speed import LLAMA, TINY_LLAMA, forge_speeds, sized_plan
from forge.events import CompileFailed, LayersCompiled
from forge.plan.gpus import FP8_CAPABILITY

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "compiled layers": {"compile": "on"},
    "fp8, compiled layers": {"fp8": True, "compile": "on"},
    "fp8": {"fp8": True},
    "liger": {"liger": True},
}
_LENGTHS = 8, 3
"""Steps that are measured, and steps before them, in which layers are compiled."""


def options(setting: Setting) -> Iterator[dict[str, Any]]:
    """Tokens per second and last loss with each option, and how many times as fast as forge's defaults."""
    default = forge_speeds(setting).get(_sized(setting).name) or _measure(setting, "default", {})
    yield {"default": {"tokens_per_s": default["tokens_per_s"]}}
    for name, changes in _OPTIONS.items():
        if (problem := _problem(changes, device=setting.device)) is not None:
            yield {name: f"skipped: {problem}"}
            continue
        try:
            figures = _measure(setting, name, changes)
        except Exception as error:  # the others are still to be measured
            yield {name: f"failed: {type(error).__name__}: {error}"}
            continue
        yield {name: figures | {"ratio": figures["tokens_per_s"] / default["tokens_per_s"]}}


def _sized(setting: Setting) -> Any:
    return TINY_LLAMA if setting.smallest else LLAMA


def _measure(setting: Setting, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    sized = _sized(setting)
    steps, warm_up = (2, 1) if setting.smallest else _LENGTHS
    plan = sized_plan(setting, sized, total_steps=warm_up + steps + 1, **changes)
    ran = run(setting, plan, to=f"option {name}")
    tokens_per_s = sized.batch * sized.seq_len / ran.mean_step_s(warm_up=warm_up)
    figures: dict[str, Any] = {"tokens_per_s": tokens_per_s, "loss": ran.losses[-1]}
    for event in ran.events:
        if isinstance(event, LayersCompiled):
            figures["compile_s"] = event.seconds
        if isinstance(event, CompileFailed):
            figures["failed"] = event.reason
    return figures


def _problem(changes: Mapping[str, Any], *, device: str) -> str | None:
    """Why options cannot be used on this machine; None if they can."""
    if device == "cpu" and ("fp8" in changes or "liger" in changes):
        return "needs a GPU"
    if "compile" in changes and torch.__version__ < "2.10":  # not a string: compared by its numbers
        return f"forge does not compile with torch {torch.__version__}"
    if "liger" in changes and importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    return fp8_problem() if "fp8" in changes else None


def fp8_problem() -> str | None:
    """Why the first GPU of this machine cannot compute in fp8; None if it can."""
    if importlib.util.find_spec("torchao") is None:
        return "the package torchao is not installed"
    gpu = torch.cuda.get_device_properties(0)
    if (gpu.major, gpu.minor) < FP8_CAPABILITY:
        return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}"
    return None
