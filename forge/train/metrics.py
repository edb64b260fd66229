"""What a step cost: peak arithmetic of the hardware, memory, tokens per second, MFU."""

from __future__ import annotations

import functools
import resource
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from forge.plan.gpus import find_gpu

# One matrix product of this many rows and columns per measurement: large enough to reach a core's or a
# GPU's full rate, small enough for a fraction of a second on one CPU core.
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
_GEMM_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The rate that MFU is measured against, of all ranks together."""

    flops: float
    source: str


def find_peak(device: torch.device, *, dtype: torch.dtype) -> Peak:
    """The peak of all ranks together: a GPU's by its data sheet, otherwise by measurement; collective.

    A CPU is measured with one thread and multiplied by this rank's threads. The fork server of a node has done
    that before it forks, so that it takes no time here.
    """
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is not None:
        own = gpu.bf16_flops if dtype == torch.bfloat16 else gpu.fp32_flops
        source = f"{gpu.name} data sheet"
    else:
        own = measure_gemm_flops(device.type, dtype=dtype)
        own *= torch.get_num_threads() if device.type == "cpu" else 1
        source = f"measured {str(dtype).removeprefix('torch.')} GEMM of {_GEMM_SIZE[device.type]}³"
    total = torch.tensor([own], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return Peak(flops=total.item(), source=source)


@functools.cache
def measure_gemm_flops(device_type: str, *, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product; the best of several.

    On CPU with one thread, and no other is started: a process that forks afterwards must not have any. The
    answer is kept for the life of the process, and by its forks.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(torch.device(device_type), dtype=dtype)
    finally:
        torch.set_num_threads(num_threads)


def _measure(device: torch.device, *, dtype: torch.dtype) -> float:
    size = _GEMM_SIZE[device.type]
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best_s = float("inf")
    deadline = time.perf_counter() + _GEMM_SECONDS
    for _ in range(2):
        left @ right
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * size**3 / best_s if best_s < float("inf") else float("nan")


def peak_memory_gib(device: torch.device) -> float:
    """This rank's largest memory so far: GPU memory held by torch on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
