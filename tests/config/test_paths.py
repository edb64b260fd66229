"""`~` means the home folder in every path of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.config.dump import dump_job
from forge.config.job import JobSpec
from forge.config.load import load_job
from forge.errors import JobFileError

JOB = """\
name: small
code: src
model: {from_pretrained: base}
data: {files: ["corpus/*.txt", "./more.txt", "/all/x.txt", "s3://bucket/x.txt"], tokenizer: {from_pretrained: tok}}
training: {total_steps: 10}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "tok"):
        (tmp_path / name).mkdir()
    (tmp_path / "job.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    return tmp_path


def test_load_job__relative_paths_and_urls__stay(folder: Path) -> None:
    job = load_job("job.yaml").job
    assert job.code == "src"
    assert job.data.files == ("corpus/*.txt", "./more.txt", "/all/x.txt", "s3://bucket/x.txt")
    assert (job.model.from_pretrained, job.checkpoint.to) == ("base", "runs")


def test_load_job__what_a_run_wrote__is_equal(folder: Path) -> None:
    job = load_job("job.yaml", overrides=["checkpoint.to=~/runs"]).job
    (folder / "written.yaml").write_text(dump_job(job))
    assert load_job(folder / "written.yaml").job == job
    assert JobSpec.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("code", "/home/me/x"),
        ("model.from_pretrained", "/home/me/x"),
        ("data.tokenizer.from_pretrained", "/home/me/x"),
        ("data.files", ("/home/me/x",)),
        ("checkpoint.to", "/home/me/x"),
    ],
)
def test_load_job__tilde__is_the_home_folder_in_every_key(folder: Path, key: str, shown: object) -> None:
    found = load_job("job.yaml", overrides=[f"{key}=~/x"]).job
    for name in key.split("."):
        found = getattr(found, name)
    assert found == shown


@pytest.mark.parametrize("key", ["code", "model.from_pretrained", "data.files", "checkpoint.to"])
def test_load_job__home_of_an_unknown_user__is_refused_at_its_key(folder: Path, key: str) -> None:
    with pytest.raises(JobFileError, match=rf"{key}.*no user 'nosuchuser'"):
        load_job("job.yaml", overrides=[f"{key}=~nosuchuser/x"])


@pytest.mark.parametrize("name", ["openai-community/gpt2", "gpt2"])
def test_load_job__id_of_the_hub__stays(folder: Path, name: str) -> None:
    assert load_job("job.yaml", overrides=[f"model.from_pretrained={name}"]).job.model.from_pretrained == name
