"""Errors of the model's inspection, with the line of the key that is to blame."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge.cluster.base import ClusterNode, ClusterStatus
from forge.config.load import LoadedJob, load_job
from forge.plan.gpu_kinds import WorkerGpu
from forge.plan.inputs import HardwareInfo
from forge.remote.submit import RemoteTarget, remote_hardware
from forge.runtime.local_gpus import num_visible_gpus, smallest_gpu
from forge.runtime.probe import _job_file_error, count_local_slots, hardware

JOB = """\
name: small
model:
  architecture: llama
  hidden_size: 64
  num_attention_heads: 2
data: {source: python-stdlib}
training: {total_steps: 10}
"""


def loaded(tmp_path: Path, *overrides: str) -> LoadedJob:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return load_job(path, overrides=overrides)


def test_job_file_error__one_of_several_suspects_from_the_command_line__is_blamed(tmp_path: Path) -> None:
    job = loaded(tmp_path, "model.num_attention_heads=3")
    suspects = ["hidden_size", "num_attention_heads"]
    error = _job_file_error(job, problem="64 is no multiple of 3", key="hidden_size", suspects=suspects)
    assert str(error) == "--set model.num_attention_heads=3: 64 is no multiple of 3"


def test_job_file_error__suspects_of_the_file__are_blamed_at_the_first(tmp_path: Path) -> None:
    job = loaded(tmp_path)
    suspects = ["hidden_size", "num_attention_heads"]
    error = _job_file_error(job, problem="64 is no multiple of 3", key="hidden_size", suspects=suspects)
    assert (error.line, error.key) == (4, "model.hidden_size")


def test_job_file_error__several_unknown_keys__are_all_named_with_their_nearest(tmp_path: Path) -> None:
    job = loaded(tmp_path, "model.rms_nrm_eps=1")
    error = _job_file_error(
        job, problem="no such key", key="hidden_sise", more_keys=["rms_nrm_eps"],
        choices=["hidden_size", "rms_norm_eps"],
    )  # fmt: skip
    assert [(one.key, one.nearest) for one in (error, *error.others)] == [
        ("model.hidden_sise", "hidden_size"),
        ("model.rms_nrm_eps", "rms_norm_eps"),
    ]


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("0,2", 2),
        ("0, 2", 2),
        ("1,-1,2", 1),
        ("7", 0),
        ("GPU-8932f937", 1),
        ("NoDevFiles", 0),
    ],
)
def test_num_visible_gpus__cuda_visible_devices__are_those_before_the_first_that_is_none(
    visible: str | None, count: int
) -> None:
    assert num_visible_gpus(4, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_count_local_slots__one_usable_cpu_of_many__is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.runtime.probe.usable_cpus", lambda: 1)
    cpu = HardwareInfo(device="cpu", name="", memory_bytes=None, peak_flops=None)
    assert count_local_slots(cpu, loaded(tmp_path).job) == 1


def test_hardware__memory_limit_of_a_container__is_what_workers_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.runtime.probe.usable_memory_bytes", lambda: 2**30)
    assert hardware(loaded(tmp_path, "resources.workers=1..4").job).memory_bytes == 2**28


def fake_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: str) -> None:
    """An `nvidia-smi` that lists GPUs, alone on the path."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_hardware__two_kinds_of_gpu_here__the_smaller_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = loaded(tmp_path, "resources.gpu=auto").job
    fake_driver(tmp_path, monkeypatch, "NVIDIA H100 80GB HBM3, 81559", "Tesla T4, 15360")
    found = hardware(job)
    assert (found.name, found.memory_bytes) == ("Tesla T4", 15360 * 2**20)
    assert found.note.startswith("the nodes have different GPUs (1 x NVIDIA H100 80GB HBM3, 1 x Tesla T4)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert (hardware(job).name, hardware(job).note) == ("NVIDIA H100 80GB HBM3", "")


def test_remote_hardware__nodes_of_two_kinds__the_smaller_and_not_the_heads(tmp_path: Path) -> None:
    def node(name: str, gpu: str, **changes: Any) -> ClusterNode:
        return ClusterNode(
            **{"name": name, "kind": "worker", "state": "alive", "gpu": gpu, "num_gpus": 8.0} | changes
        )

    def planned(gpu: str, *nodes: ClusterNode) -> HardwareInfo:
        target = RemoteTarget(
            cluster=SimpleNamespace(shares_files=False),  # type: ignore[arg-type]
            python="python",
            gpu=WorkerGpu(name="H100-80GB", memory_bytes=80 * 2**30),
            storage="",
        )
        status = ClusterStatus(name="lab", provider="ssh", address="10.0.0.1:6379", nodes=nodes)
        return remote_hardware(target, status=status)(loaded(tmp_path, f"resources.gpu={gpu}").job)

    gone = node("c", "T4", state="gone")
    found = planned("auto", node("a", "H100"), node("b", "A100"), gone)
    assert (found.name, found.memory_bytes) == ("A100-40GB", 40 * 2**30)
    assert "(8 x H100-80GB, 8 x A100-40GB)" in found.note
    assert planned("auto", node("a", "H100"), gone).note == ""
    named = planned("H100", node("a", "H100"), node("b", "A100"))
    assert (named.name, named.memory_bytes) == ("H100-80GB", 80 * 2**30)
    assert "nodes have A100-40GB with less memory: set resources.gpu: auto" in named.note


def test_smallest_gpu__devices_of_a_run__by_their_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, monkeypatch, "NVIDIA H100, 81559", "Tesla T4, 15360", "NVIDIA H100, 81559")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as in an actor of Ray without GPUs
    t4, h100 = ("Tesla T4", 15360 * 2**20), ("NVIDIA H100", 81559 * 2**20)
    assert smallest_gpu(("cuda:0", "cuda:2")) == h100
    assert smallest_gpu(("cuda:0", "cuda:1")) == t4
    assert smallest_gpu(("cuda:GPU-8932f937",)) == t4  # any of them
    assert smallest_gpu(("cpu", "cpu")) is None
