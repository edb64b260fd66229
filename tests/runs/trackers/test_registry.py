"""Which trackers a job gets, and what is said of packages that are missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from forge import api
from forge.config.load import load_job
from forge.errors import JobFileError
from forge.runs.trackers import registry
from forge.runtime import doctor

SMALL = """\
name: small
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {source: python-stdlib, seq_len: 16}
training: {total_steps: 4, global_batch_size: 4}
"""

_TRACKED = SMALL + "tracking:\n  mlflow: {experiment: lab}\n  tensorboard: true\n"


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(registry, "version", find)


def write_job(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("nothing_installed")
def test_start__package_of_a_tracker_missing__refused_with_line_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = _TRACKED.count("\n") - 1
    with pytest.raises(JobFileError) as caught:
        api.start(write_job(tmp_path, _TRACKED))
    assert f"job.yaml:{line}" in str(caught.value)
    assert "pip install 'forge-train[mlflow]'" in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("nothing_installed")
def test_doctor__packages_of_trackers_missing__notes_with_commands() -> None:
    found = {finding.what: finding for finding in doctor._trackers()}
    assert {finding.state for finding in found.values()} == {"note"}
    assert found["tracking.tensorboard"].remedy == "pip install 'forge-train[tensorboard]'"


@pytest.mark.usefixtures("nothing_installed")
def test_package_warnings__trackers_of_the_job__name_package_and_command(tmp_path: Path) -> None:
    job = load_job(write_job(tmp_path, _TRACKED)).job
    mlflow, tensorboard = registry.package_warnings(job.tracking)
    assert "mlflow-skinny" in mlflow and "forge-train[tensorboard]" in tensorboard
    assert registry.package_warnings(load_job(write_job(tmp_path, SMALL)).job.tracking) == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mlflow: {uri: 'https://user:pass@mlflow.example.com'}", "user name or password"),
        ("mlflow: {uri: 'https://mlflow.example.com/?token=hunter2abc'}", "key or signature"),
        ("mlflow: {uri: '${env:TRACKING}'}", "user name or password"),
        ("mlflow: {uri: '${env:MLFLOW_TRACKING_TOKEN}'}", "MLFLOW_TRACKING_TOKEN"),
        ("mlflow: {uri: ./mlruns}", "absolute path"),
        ("mlflow: {uri: 'sqlite:///mlflow.db'}", "absolute path"),
        ("mlflow: {uri: 'file:///tmp/mlruns'}", "absolute path"),
        ("mlflow: {experimnt: lab}", "experiment"),
        ("mlflow: {token: hunter2abc}", "read from the environment"),
        ("tensorbord: true", "tensorboard"),
        ("tensorboard: 3", "tensorboard"),
    ],
)
def test_load__tracking__wrong_key_or_value_has_line_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str
) -> None:
    monkeypatch.setenv("TRACKING", "https://user:pass@mlflow.example.com")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2abc")
    with pytest.raises(JobFileError) as caught:
        load_job(write_job(tmp_path, f"{SMALL}tracking:\n  {text}\n"))
    line = SMALL.count("\n") + 2
    assert f"job.yaml:{line}" in str(caught.value) and problem in str(caught.value)
    assert "hunter2abc" not in str(caught.value) and "user:pass" not in str(caught.value)
