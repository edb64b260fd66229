"""Peak FLOP/s and memory of known GPUs, against which MFU is measured and memory is planned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU: memory, links and dense peak rates (without structured sparsity), from its data sheet."""

    name: str
    memory_gib: int
    bf16_flops: float
    fp32_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the other GPUs of its node, one direction: NVLink, or PCI Express where the GPU has no NVLink."""
    host_bytes_per_s: float
    """To the memory of its machine, one direction: PCI Express with 16 lanes."""
    compute_capability: tuple[int, int]
    """Of CUDA: major and minor number."""
    marks: tuple[str, ...]
    """Lower-case words that `torch.cuda.get_device_name()` must all contain."""


FP8_CAPABILITY = (8, 9)
"""Least compute capability of GPUs that multiply in fp8. Source: torch's `_scaled_mm`."""

# Source: NVIDIA's data sheets, the SXM variant if there are several. bf16: dense tensor-core rate (fp16 for V100
# and T4, which have no bf16). fp32: without tensor cores, because torch does not use TF32 by default.
# Compute capabilities: https://developer.nvidia.com/cuda-gpus.
# Links: NVLink 2, 3, 4, 5 have 150, 300, 450, 900 GB/s in a direction; PCI Express 3, 4 and 5
# with 16 lanes 16, 32 and 64.
GPUS: tuple[Gpu, ...] = (
    Gpu(
        name="B200",
        memory_gib=180,
        bf16_flops=2250e12,
        fp32_flops=75e12,
        memory_bytes_per_s=8000e9,
        link_bytes_per_s=900e9,
        host_bytes_per_s=64e9,
        compute_capability=(10, 0),
        marks=("b200",),
    ),
    Gpu(
        name="H200",
        memory_gib=141,
        bf16_flops=989.5e12,
        fp32_flops=66.9e12,
        memory_bytes_per_s=4800e9,
        link_bytes_per_s=450e9,
        host_bytes_per_s=64e9,
        compute_capability=(9, 0),
        marks=("h200",),
    ),
    Gpu(
        name="H100-NVL",
        memory_gib=94,
        bf16_flops=835e12,
        fp32_flops=60e12,
        memory_bytes_per_s=3900e9,
        link_bytes_per_s=300e9,
        host_bytes_per_s=64e9,
        compute_capability=(9, 0),
        marks=("h100", "nvl"),
    ),
    Gpu(
        name="H100-PCIe",
        memory_gib=80,
        bf16_flops=756e12,
        fp32_flops=51e12,
        memory_bytes_per_s=2000e9,
        link_bytes_per_s=300e9,
        host_bytes_per_s=64e9,
        compute_capability=(9, 0),
        marks=("h100", "pcie"),
    ),
    Gpu(
        name="H100-80GB",
        memory_gib=80,
        bf16_flops=989.5e12,
        fp32_flops=66.9e12,
        memory_bytes_per_s=3350e9,
        link_bytes_per_s=450e9,
        host_bytes_per_s=64e9,
        compute_capability=(9, 0),
        marks=("h100",),
    ),
    Gpu(
        name="A100-80GB",
        memory_gib=80,
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bytes_per_s=2039e9,
        link_bytes_per_s=300e9,
        host_bytes_per_s=32e9,
        compute_capability=(8, 0),
        marks=("a100", "80gb"),
    ),
    Gpu(
        name="A100-40GB",
        memory_gib=40,
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bytes_per_s=1555e9,
        link_bytes_per_s=300e9,
        host_bytes_per_s=32e9,
        compute_capability=(8, 0),
        marks=("a100",),
    ),
    Gpu(
        name="L40S",
        memory_gib=48,
        bf16_flops=362e12,
        fp32_flops=91.6e12,
        memory_bytes_per_s=864e9,
        link_bytes_per_s=32e9,
        host_bytes_per_s=32e9,
        compute_capability=(8, 9),
        marks=("l40s",),
    ),
    Gpu(
        name="A10G",
        memory_gib=24,
        bf16_flops=70e12,
        fp32_flops=35e12,
        memory_bytes_per_s=600e9,
        link_bytes_per_s=32e9,
        host_bytes_per_s=32e9,
        compute_capability=(8, 6),
        marks=("a10g",),
    ),
    Gpu(
        name="A10",
        memory_gib=24,
        bf16_flops=125e12,
        fp32_flops=31.2e12,
        memory_bytes_per_s=600e9,
        link_bytes_per_s=32e9,
        host_bytes_per_s=32e9,
        compute_capability=(8, 6),
        marks=("a10",),
    ),
    Gpu(
        name="L4",
        memory_gib=24,
        bf16_flops=121e12,
        fp32_flops=30.3e12,
        memory_bytes_per_s=300e9,
        link_bytes_per_s=32e9,
        host_bytes_per_s=32e9,
        compute_capability=(8, 9),
        marks=("l4",),
    ),
    Gpu(
        name="RTX-4090",
        memory_gib=24,
        bf16_flops=165.2e12,
        fp32_flops=82.6e12,
        memory_bytes_per_s=1008e9,
        link_bytes_per_s=32e9,
        host_bytes_per_s=32e9,
        compute_capability=(8, 9),
        marks=("4090",),
    ),
    Gpu(
        name="V100-32GB",
        memory_gib=32,
        bf16_flops=125e12,
        fp32_flops=15.7e12,
        memory_bytes_per_s=900e9,
        link_bytes_per_s=150e9,
        host_bytes_per_s=16e9,
        compute_capability=(7, 0),
        marks=("v100", "32gb"),
    ),
    Gpu(
        name="V100-16GB",
        memory_gib=16,
        bf16_flops=125e12,
        fp32_flops=15.7e12,
        memory_bytes_per_s=900e9,
        link_bytes_per_s=150e9,
        host_bytes_per_s=16e9,
        compute_capability=(7, 0),
        marks=("v100",),
    ),
    Gpu(
        name="T4",
        memory_gib=16,
        bf16_flops=65e12,
        fp32_flops=8.1e12,
        memory_bytes_per_s=320e9,
        link_bytes_per_s=16e9,
        host_bytes_per_s=16e9,
        compute_capability=(7, 5),
        marks=("t4",),
    ),
)


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU with this name, as a cluster file or torch writes it; None if it is not in the table."""
    lowered = name.lower()
    for gpu in GPUS:
        if lowered == gpu.name.lower():
            return gpu
    words = lowered.replace("-", " ").split()
    return next((gpu for gpu in GPUS if set(gpu.marks) <= set(words)), None)
