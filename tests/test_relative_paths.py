"""Messages about relative paths that do not exist name the folder that they were looked for in."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.environment import looked_in
from forge.errors import ForgeError
from tests.support.command import environment

JOB = """\
name: tiny
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "a.txt", seq_len: 32}
training: {total_steps: 5, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none}
"""


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "absent.yaml"],
        ["plan", "job.yaml", "--set", "data.files=absent/*.txt"],
        ["plan", "job.yaml", "--set", "data.tokenizer.from_pretrained=./absent"],
        ["cluster", "up", "absent.yaml"],
        ["train", "job.yaml", "--cluster", "./absent.yaml"],
        ["chaos", "replay", "absent.csv", "--job", "job.yaml"],
        ["runs", "show", "absent"],
        ["runs", "show", "absent", "--runs", "some/runs"],
        ["generate", "absent", "--prompt", "a"],
    ],
)
def test_command__relative_path_that_does_not_exist__names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "a.txt").write_text("the cat sat on a mat. " * 100)
    monkeypatch.chdir(tmp_path)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ForgeError)
    assert f"(looked in {tmp_path})" in str(result.exception)


def test_looked_in__absolute_and_home__say_nothing_more() -> None:
    assert looked_in("/absent") == looked_in("~/absent") == ""


def test_looked_in__current_folder_removed__says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert looked_in("absent") == " (the current folder does not exist any more)"
    monkeypatch.chdir(tmp_path)
