"""Errors of the model's inspection, with the line of the key that is to blame."""

from __future__ import annotations

from pathlib import Path

from forge.config.load import LoadedJob, load_job
from forge.runtime.probe import _job_file_error

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
