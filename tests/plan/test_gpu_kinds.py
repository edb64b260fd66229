"""The GPU that a plan counts with where nodes have several kinds."""

from __future__ import annotations

import pytest

from forge.plan.gpu_kinds import WorkerGpu, planned_gpu

GIB = 2**30
A100_80 = WorkerGpu(name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * GIB)
H100 = WorkerGpu(name="H100-80GB", memory_bytes=80 * GIB)


@pytest.mark.parametrize(
    ("kinds", "stated", "name", "gib"),
    [
        ({"A100": 8}, A100_80, "NVIDIA A100-SXM4-80GB", 80),
        ({"A100": 8}, None, "A100-40GB", 40),
        ({"A100-80G": 8}, None, "A100-80GB", 80),
        ({}, H100, "H100-80GB", 80),
        ({"NVIDIA-X9000": 8}, H100, "H100-80GB", 80),
    ],
)
def test_planned_gpu__one_kind__as_stated_or_of_the_catalogue(
    kinds: dict[str, int], stated: WorkerGpu | None, name: str, gib: int
) -> None:
    found = planned_gpu(kinds, stated=() if stated is None else (stated,))
    assert found == WorkerGpu(name=name, memory_bytes=gib * GIB)


@pytest.mark.parametrize("order", [1, -1])
def test_planned_gpu__several_kinds__least_memory_and_lowest_speed_by_name(order: int) -> None:
    kinds = dict([("H100", 8), ("A100", 4)][::order])
    found = planned_gpu(kinds, stated=(H100,))
    assert found is not None
    assert (found.name, found.memory_bytes) == ("A100-40GB", 40 * GIB)
    listed = ", ".join(["8 x H100-80GB", "4 x A100-40GB"][::order])
    assert found.note == (
        f"the nodes have different GPUs ({listed}): the plan counts with A100-40GB (40 GiB), the slowest and "
        "smallest"
    )


def test_planned_gpu__smallest_is_not_the_slowest__both_are_named() -> None:
    found = planned_gpu({"A100": 8, "L40S": 2}, stated=(A100_80,))
    assert found is not None
    assert (found.name, found.memory_bytes) == ("NVIDIA A100-SXM4-80GB", 48 * GIB)
    assert found.note.endswith("with NVIDIA A100-SXM4-80GB, the slowest, and the 48 GiB of L40S")


def test_planned_gpu__kind_that_is_not_stated__is_planned_for_and_said() -> None:
    found = planned_gpu({"T4": 4}, stated=(H100,))
    assert found == WorkerGpu(
        name="T4", memory_bytes=16 * GIB, note="the nodes have T4, not H100-80GB: the plan counts with T4"
    )
    unknown = planned_gpu({"T4": 4, "X9000": 2})
    assert unknown is not None and unknown.name == "T4"
    assert unknown.note.endswith("memory and speed of X9000 are unknown, and not counted")
    assert planned_gpu({"X9000": 2}) is None
