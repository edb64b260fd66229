"""Table of GPUs, and FLOPs per token."""

from __future__ import annotations

import pytest

from forge.plan.flops import flops_per_token
from forge.plan.gpus import find_gpu
from tests.support.jobs import tiny_facts


@pytest.mark.parametrize(
    ("device_name", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla T4", "T4"),
        ("a100-80gb", "A100-80GB"),
    ],
)
def test_find_gpu__driver_name__is_found(device_name: str, gpu: str) -> None:
    found = find_gpu(device_name)
    assert found is not None
    assert found.name == gpu


@pytest.mark.parametrize("device_name", ["NVIDIA L40", "NVIDIA GeForce GTX 1080", "AMD Instinct MI300X", ""])
def test_find_gpu__unknown_name__is_none(device_name: str) -> None:
    assert find_gpu(device_name) is None


def test_flops_per_token__causal_lm__follows_palm() -> None:
    facts = tiny_facts(num_matmul_parameters=1000, num_layers=2, attention_width=10)
    assert flops_per_token(facts, seq_len=5) == 6 * 1000 + 12 * 2 * 10 * 5
