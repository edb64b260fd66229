"""Errors of the model's inspection, with the line of the key that is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.config.load import LoadedJob, load_job
from forge.plan.inputs import HardwareInfo
from forge.runtime.local_gpus import num_visible_gpus
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
