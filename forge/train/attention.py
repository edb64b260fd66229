"""The implementation of attention that all ranks of a generation use (`training.attention`).

The plan names candidates in order (`forge.plan.speed.attention_choice`). Which of them are installed and run on a
GPU is known on its machine alone, so each rank tries them there, and all take the first that runs on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from forge.errors import RunError
from forge.events import AttentionChosen, Reporter
from forge.plan.speed import AttentionChoice
from forge.process import one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class _FlashPackage:
    """A package that transformers' `flash_attention_N` calls, and the GPUs that it is made for."""

    package: str
    is_installed: Callable[[], bool]
    least_capability: int
    """Major number of CUDA's compute capability."""
    largest_capability: int


_PACKAGES = {
    "flash_attention_2": _FlashPackage(
        package="flash-attn", is_installed=is_flash_attn_2_available, least_capability=8, largest_capability=99
    ),
    "flash_attention_3": _FlashPackage(
        package="flash-attn-3", is_installed=is_flash_attn_3_available, least_capability=9, largest_capability=9
    ),
}
"""Source: https://github.com/Dao-AILab/flash-attention, README: "Ampere, Ada, or Hopper GPUs", and for
FlashAttention-3 "H100 / H800"."""


def agree_on_attention(
    choice: AttentionChoice, *, head_size: int, device: torch.device, reporter: Reporter
) -> str | None:
    """Return the first candidate that runs on every rank; collective if there are several.

    Args:
        head_size: width of a head.

    Returns: None if transformers' own default is used.
    Raises: RunError if none of the candidates runs.
    """
    if not choice.names:
        return None
    reasons: list[str] = []
    for name in choice.names:
        problem = _shared(partial(attention_problem, name, head_size=head_size, device=device))
        if problem is None:
            if name.startswith("flash"):
                # Otherwise gradients are summed in any order, and a resumed run is not equal bit for bit.
                os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
            if len(choice.names) > 1:
                reason = "; ".join(reasons) or "the fastest of those that run on every rank"
                reporter.event(AttentionChosen(name=name, reason=reason))
            return name
        reasons.append(f"not {name}: {problem}")
    raise RunError(f"training.attention: {'; '.join(reasons)}; use auto")


def attention_problem(name: str, *, head_size: int, device: torch.device) -> str | None:
    """Return why an implementation cannot be used in this process; None if it can.

    FlashAttention is called once, forward and backward: its package may have been built for another torch or GPU.
    transformers itself would load code of the Hub where the package is missing but `kernels` is installed.
    """
    found = _PACKAGES.get(name)
    if found is None:
        return None
    if device.type != "cuda":
        return "needs a GPU"
    if not found.is_installed():
        return f"the package {found.package} is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if not found.least_capability <= major <= found.largest_capability:
        return f"{found.package} does not run on GPUs of compute capability {major}.{minor}"
    try:
        _try_once(name, head_size=head_size, device=device)
    except Exception as error:  # whatever its kernels raise
        return f"{found.package} does not run here: {one_line(error)}"
    return None


def _try_once(name: str, *, head_size: int, device: torch.device) -> None:
    attend = import_module("flash_attn" if name == "flash_attention_2" else "flash_attn_interface").flash_attn_func
    values = [
        torch.zeros(1, 16, 1, head_size, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)
    ]
    out: Any = attend(*values, causal=True)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    torch.cuda.synchronize(device)


def _shared(find_problem: Callable[[], str | None]) -> str | None:
    """Return the problem of the first rank that has one; collective."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_problem())
    return next((problem for problem in found if problem is not None), None)
