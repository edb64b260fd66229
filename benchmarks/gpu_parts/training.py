"""Training tests of `benchmarks.gpu`: the same assertions as tests/train, on a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.options import fp8_problem
from benchmarks.gpu_parts.ranks import Ran, Setting, make_job_plan, run
from forge.events import Evaluated

_MODEL = {
    "architecture": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_REFERENCE = "reference.json"
_CPU_TOLERANCE = 1e-4
"""Of losses in fp32 on a GPU against those on the CPU: products are summed in another order."""
_SAME_TOLERANCE = 1e-5
"""Of losses in fp32 on one device, computed in another order."""
_BF16_TOLERANCE = 2**-8
_FP8_TOLERANCE = 0.02
"""Of a model with layers of 64 and 128; emulated on a CPU its losses are within 0.01 of those of bf16."""
_STEPS, _STOP = 6, 3


def reference(setting: Setting) -> Iterator[dict[str, Any]]:
    """Losses on the CPU in fp32 without ZeRO, for the tests that follow."""
    losses = _losses(setting, name="reference", zero={"stage": 0})
    (Path(setting.folder) / _REFERENCE).write_text(json.dumps(losses))
    yield {"losses": losses}


def training(setting: Setting) -> Iterator[dict[str, Any]]:
    """Every stage, offload, EMA, resuming bit for bit, equal losses; each test with its largest deviation."""
    path = Path(setting.folder) / _REFERENCE
    if not path.exists():
        raise RuntimeError("the part `reference` did not end, so there is nothing to compare with")
    expected = json.loads(path.read_text())
    stages = (0, 3) if setting.smallest else (0, 1, 2, 3)
    own: list[float] = []
    for stage in stages:
        found = _losses(setting, name=f"fp32-{stage}", zero={"stage": stage})
        own = own or found
        yield _close(f"ZeRO {stage}, fp32: losses of the CPU", found, expected, tolerance=_CPU_TOLERANCE)
    for stage in stages[1:] if setting.smallest else stages:
        yield from _resumed(setting, stage=stage)
    plain = _losses(setting, name="plain", zero={"stage": 0}, cross_entropy="plain")
    yield _close("plain loss: losses of the chunked one", plain, own, tolerance=_SAME_TOLERANCE)
    recomputed = _losses(setting, name="recomputed", zero={"stage": 0}, activation_checkpointing=True)
    yield _close("activation checkpointing: same losses", recomputed, own, tolerance=_SAME_TOLERANCE)
    moved = _losses(
        setting, name="moved", zero={"stage": 0}, activation_checkpointing=True, activation_offload=True
    )
    yield _close("activation offload: same losses", moved, own, tolerance=_SAME_TOLERANCE)
    if setting.smallest:
        yield {"ZeRO 1 and 2, offload, bf16 against fp32, fp8": "skipped: --smallest"}
        return
    offloaded = _losses(setting, name="offload", zero={"stage": 2, "offload": "cpu"})
    yield _close("offload: same losses", offloaded, own, tolerance=_CPU_TOLERANCE)
    half = _losses(setting, name="half", zero={"stage": 2}, precision="bf16")
    yield _close("bf16: losses within rounding", half, own, tolerance=_BF16_TOLERANCE)
    if (problem := fp8_problem()) is not None:
        yield {"fp8: losses near those of bf16": f"skipped: {problem}"}
        return
    eighth = _losses(setting, name="fp8", zero={"stage": 2}, precision="bf16", fp8=True)
    yield _close("fp8: losses near those of bf16", eighth, half, tolerance=_FP8_TOLERANCE)


def _resumed(setting: Setting, *, stage: int) -> Iterator[dict[str, Any]]:
    """Train whole and in two parts, in bf16 with an EMA; every loss and evaluation must be equal bit for bit."""
    plan = _plan(setting, zero={"stage": stage}, precision="bf16", ema={"decay": 0.9})
    whole = run(setting, plan, to=f"whole-{stage}")
    first = run(setting, plan, to=f"parts-{stage}", stop_after=_STOP)
    second = run(setting, plan, to=f"parts-{stage}")
    name = f"ZeRO {stage}, bf16, EMA: resumed bit for bit"
    yield _close(name, first.losses + second.losses, whole.losses, tolerance=0.0)
    evaluated = _evaluations(whole)
    name = f"ZeRO {stage}: evaluations of the resumed run, EMA's too"
    yield _close(name, _evaluations(second), evaluated, tolerance=0.0, length=2)


def _evaluations(ran: Ran) -> list[float]:
    return [event.loss for event in ran.events if isinstance(event, Evaluated)]


def _losses(setting: Setting, *, name: str, **changes: Any) -> list[float]:
    return run(setting, _plan(setting, **{"precision": "fp32", **changes}), to=name).losses


def _plan(setting: Setting, **changes: Any) -> Any:
    training = {"total_steps": _STEPS, "global_batch_size": 12, "optimizer": {"lr": 1e-2}, **changes}
    return make_job_plan(setting, model=_MODEL, training=training, vocab_size=300, seq_len=32)


def _close(
    name: str, found: Sequence[float], expected: Sequence[float], *, tolerance: float, length: int = _STEPS
) -> dict[str, Any]:
    """Compare losses. Returns: the test's outcome under its name."""
    same = len(found) == len(expected) == length
    pairs = zip(found, expected, strict=False)
    worst = max((abs(one / other - 1) for one, other in pairs), default=math.nan) if same else math.nan
    return {name: {"passed": same and worst <= tolerance, "deviation": worst, "tolerance": tolerance}}
