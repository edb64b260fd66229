"""The peak arithmetic rate that MFU is measured against.

A GPU's peak is in its data sheet. A CPU's is measured once on each machine and kept in the state folder, by
processor, precision and version of torch: with a measurement for every generation, the MFU of a run would change
with whatever else ran on the machine. Delete the folder `peaks` in the state folder to measure again.

    python -m forge.train.peak bfloat16     the rate of a core of this machine, for the planner, which has no torch
"""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import torch
import torch.distributed as dist

from forge.limits import cpu_name
from forge.plan.gpus import find_gpu
from forge.train.kept_peak import MeasuredPeak, keep_peak

# One matrix product of this many rows and columns per measurement: large enough to reach a core's or a
# GPU's full rate, small enough for a fraction of a second on one CPU core.
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
_GEMM_SECONDS = 0.5
_MIN_PRODUCTS = 3


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
        measured = measured_peak(device.type, dtype=dtype)
        own = measured.flops * (torch.get_num_threads() if device.type == "cpu" else 1)
        source = f"{measured.dtype} GEMM of {_GEMM_SIZE[device.type]}³, measured on {measured.measured_on}"
    total = torch.tensor([own], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return Peak(flops=total.item(), source=source)


@functools.cache
def measured_peak(device_type: str, *, dtype: torch.dtype) -> MeasuredPeak:
    """Return the kept rate of a CPU core, or of a GPU that is in no catalog; measure it if none is kept.

    On CPU no thread is started: a process that forks afterwards must not have any. The answer is kept for the life
    of the process, and by its forks. It is measured again by each process if the state folder cannot be written.
    """
    processor = cpu_name() if device_type == "cpu" else torch.cuda.get_device_name()
    name = str(dtype).removeprefix("torch.")

    def measure() -> MeasuredPeak:
        return MeasuredPeak(
            processor=processor,
            dtype=name,
            torch=str(torch.__version__),
            flops=measure_gemm_flops(device_type, dtype=dtype),
            measured_on=f"{datetime.now(UTC):%Y-%m-%d}",
        )

    try:
        return keep_peak(processor, dtype=name, torch=str(torch.__version__), measure=measure)
    except OSError:
        return measure()


def measure_gemm_flops(device_type: str, *, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product; the best of several.

    On CPU with one thread, by the time that this thread has run: other processes on the machine do not count.
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
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    best_s, num_products = float("inf"), 0
    for _ in range(2):
        left @ right
    deadline = time.perf_counter() + _GEMM_SECONDS
    while num_products < _MIN_PRODUCTS or time.perf_counter() < deadline:
        began = clock()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s, num_products = min(best_s, clock() - began), num_products + 1
    return 2 * size**3 / best_s


def main() -> None:
    """Print the rate of a CPU core, which is measured if none is kept."""
    sys.stdout.write(json.dumps(asdict(measured_peak("cpu", dtype=getattr(torch, sys.argv[1])))) + "\n")


if __name__ == "__main__":
    main()
