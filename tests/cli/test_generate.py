"""`forge generate`: what is refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.errors import ArgumentError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-p", "0"], "top_p is 0"),
        (["--top-p", "1.5"], "top_p is 1.5; it must be from 0 to 1"),
        (["--temperature", "1e-9"], "temperature is 1e-09; it must be 0, or 1e-05 or more"),
        (["--beams", "2", "--temperature", "1"], "num_beams requires temperature 0"),
        (["-n", "2", "--temperature", "0"], "n larger than 1 requires"),
        (["--stop", ""], "stop must be"),
    ],
)
def test_sampling__out_of_range__is_refused_before_the_model_is_looked_for(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", "missing", "-p", "a", *words])
    assert isinstance(result.exception, ArgumentError) and message in str(result.exception)


def test_output__exists__is_refused_at_once(tmp_path: Path) -> None:
    for name in ("prompts.jsonl", "answers.jsonl"):
        (tmp_path / name).write_text('"a"\n')
    words = ["--input", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    result = CliRunner().invoke(app, ["generate", "missing", *words])
    assert isinstance(result.exception, ArgumentError) and "answers.jsonl exists" in str(result.exception)


def test_sampling_params__imports_no_torch() -> None:
    code = "import sys, forge.inference.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
