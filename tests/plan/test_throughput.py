"""The estimate of a step's time: cases worked out by hand, and published measurements."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from forge.plan.gpus import find_gpu
from forge.plan.throughput import (
    Estimate,
    Interconnect,
    StepWork,
    estimate_step,
    with_uncertainty,
)

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT.parent / "shared" / "published" / "throughput.csv"

H100 = find_gpu("H100-80GB")
assert H100 is not None
NODES_OF_8 = Interconnect(gpus_per_node=8, inter_node_bytes_per_s=400e9)

# Llama 3.1 8B, one micro-batch of 2 × 8,192 tokens on each of 8 GPUs, ZeRO 3.
_LAYERS, _HIDDEN, _MLP, _VOCAB = 32, 4096, 14336, 128256
_LAYER_PARAMETERS = 2 * _HIDDEN**2 + 2 * _HIDDEN * 1024 + 3 * _HIDDEN * _MLP
_MATRICES = _LAYERS * _LAYER_PARAMETERS + _VOCAB * _HIDDEN
LLAMA_8B = StepWork(
    tokens=2 * 8192,
    num_micro_batches=1,
    matmul_flops=6.0 * _MATRICES,
    attention_flops=4 * _LAYERS * _HIDDEN * 8192 / 2,
    hidden_size=_HIDDEN,
    activation_bytes=_LAYERS * (10 * _HIDDEN + 3 * _MLP) * 2,
    logit_bytes=_VOCAB * 12,
    weight_bytes=2 * 8.03e9,
    gradient_bytes=2 * 8.03e9,
    state_bytes=28 * 8.03e9 / 8,
    stage=3,
    world_size=8,
    peak_flops=H100.bf16_flops,
)


def test_estimate__published_rows__aims_with_room(tmp_path: Path) -> None:
    if not PUBLISHED.is_file():
        pytest.skip("no throughput.csv beside this checkout")
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.forecast", "--fit"]
    command += ["--published", str(PUBLISHED), "--json", str(figures)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = json.loads(figures.read_text())
    for errors in (found, found["cross_validated"], found["other_models"]):
        assert errors["median_error"] <= 0.06
        assert errors["p90_error"] <= 0.20
        assert errors["pairs_right"] >= 0.95


def test_estimate__llama_8b_of_another_source__between_its_two_measurements_or_near() -> None:
    """torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, commit b5bcd76c: 5,762 tokens/s of a GPU with
    selective recomputation, 6,667 compiled. Selective recomputation lies between none and all."""
    without = estimate_step(LLAMA_8B, gpu=H100, interconnect=NODES_OF_8).tokens_per_s
    work = dataclasses.replace(LLAMA_8B, recomputed_flops=2.0 * _LAYERS * _LAYER_PARAMETERS)
    with_all = estimate_step(work, gpu=H100, interconnect=NODES_OF_8).tokens_per_s
    assert with_all < 6667 < without
    assert with_all == pytest.approx(5762, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "micro_batches", "volumes"),
    [
        (0, 4, 2),  # all-reduce once
        (1, 4, 3),  # all-reduce and all-gather once
        (2, 4, 9),  # all-reduce 4 times, all-gather once
        (3, 4, 12),  # gather twice and reduce once, 4 times
    ],
)
def test_communication__one_gigabyte__volumes_of_the_stage(stage: int, micro_batches: int, volumes: int) -> None:
    work = dataclasses.replace(
        LLAMA_8B,
        stage=stage,
        num_micro_batches=micro_batches,
        weight_bytes=1e9,
        gradient_bytes=1e9,
        world_size=4,
    )
    assert H100 is not None
    seconds = estimate_step(work, gpu=H100, interconnect=NODES_OF_8).communication_s
    assert seconds == pytest.approx(volumes * 1e9 * 3 / 4 / (H100.link_bytes_per_s * 0.551))


def test_estimate__slower_network__slower_only_across_nodes() -> None:
    slow = Interconnect(gpus_per_node=8, inter_node_bytes_per_s=12.5e9)
    across = dataclasses.replace(LLAMA_8B, world_size=16)
    assert H100 is not None
    assert (
        estimate_step(LLAMA_8B, gpu=H100, interconnect=slow).total_s
        == estimate_step(LLAMA_8B, gpu=H100, interconnect=NODES_OF_8).total_s
    )
    assert (
        estimate_step(across, gpu=H100, interconnect=slow).total_s
        > 1.5 * estimate_step(across, gpu=H100, interconnect=NODES_OF_8).total_s
    )


def test_estimate__one_gpu__no_communication() -> None:
    assert H100 is not None
    alone = dataclasses.replace(LLAMA_8B, world_size=1)
    assert estimate_step(alone, gpu=H100, interconnect=NODES_OF_8).communication_s == 0


def test_range__inverted__stays_in_order() -> None:
    hours = Estimate(low=50, likely=100, high=200).inverted(1000)
    assert (hours.low, hours.likely, hours.high) == (5, 10, 20)


def test_uncertainty__gpu_that_was_not_measured__wider() -> None:
    l4 = find_gpu("L4")
    assert l4 is not None
    assert H100 is not None
    assert with_uncertainty(1.0, gpu=l4).low < with_uncertainty(1.0, gpu=H100).low < 1


def test_estimate__inputs_of_layers_in_host_memory__both_copies_are_not_hidden() -> None:
    assert H100 is not None
    copied = 32 * 4096 * 2  # of a token: layers x hidden size x bytes
    work = dataclasses.replace(LLAMA_8B, num_micro_batches=3, offloaded_bytes=copied)
    kept, moved = (
        estimate_step(one, gpu=H100, interconnect=NODES_OF_8)
        for one in (dataclasses.replace(work, offloaded_bytes=0.0), work)
    )
    assert moved.copies_s == pytest.approx(3 * 2 * 16384 * copied / (0.8 * 64e9))  # PCI Express 5
    assert kept.copies_s == 0
    assert moved.total_s == pytest.approx(kept.total_s + moved.copies_s)
