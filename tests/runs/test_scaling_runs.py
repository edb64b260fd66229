"""Runs that a scaling law is fitted to: what is read of them, what is refused, and six that are really trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ArgumentError
from forge.events import RunFinished
from forge.plan.scaling import HOFFMANN, ModelScale
from forge.plan.scaling_fit import RunPoint, fit_law
from forge.runs.scaling_runs import read_law, read_points, write_law
from tests.support.command import forge
from tests.support.runs import make_run

LADDER = ((32, 100_000), (48, 150_000), (64, 220_000), (96, 330_000), (128, 470_000), (176, 680_000))
"""Width and tokens of the six runs."""
JOB = """
name: ladder-{width}
model:
  architecture: llama
  hidden_size: {width}
  intermediate_size: {mlp}
  num_hidden_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 2
  tie_word_embeddings: true
data:
  source: python-stdlib
  tokenizer: {{train: bpe, vocab_size: 1024}}
  seq_len: 128
training:
  total_tokens: {tokens}
  global_batch_size: 8
  optimizer: {{lr: {lr}}}  # falls with the width, as it should (Yang et al. 2022, arXiv 2203.03466)
  schedule: {{kind: cosine, warmup: 10%}}
  precision: fp32
  zero: {{stage: 0}}
  evaluate_every: 100000 steps
checkpoint: {{every: 10h, keep: 1}}
tracking: {{wandb: {{mode: disabled}}}}
"""


def finished(root: Path, name: str, *, steps: int = 40) -> Path:
    return make_run(root, name, steps=steps, endings=[RunFinished(step=steps)])


def test_points__finished_run__parameters_tokens_and_a_loss(tmp_path: Path) -> None:
    finished(tmp_path, "tiny-0101-000000-aaaa")
    found = read_points(["tiny-0101-000000-aaaa"], root=tmp_path)
    (point,) = found.points
    assert point.num_tokens == 192 * 40
    assert point.num_parameters > 0
    assert point.loss == pytest.approx((5 / 39 + 5 / 40) / 2)
    assert "no held-out loss at its last step" in found.notes[0]


def test_points__run_that_has_not_finished__refused(tmp_path: Path) -> None:
    make_run(tmp_path, "tiny-0101-000000-aaaa")
    with pytest.raises(ArgumentError, match="has not reached its end"):
        read_points(["tiny-0101-000000-aaaa"], root=tmp_path)


def test_points__another_vocabulary__refused(tmp_path: Path) -> None:
    names = ["tiny-0101-000000-aaaa", "tiny-0101-000000-bbbb"]
    for name in names:
        finished(tmp_path, name)
    plan = tmp_path / names[0] / "plan.json"
    body = json.loads(plan.read_text())
    body["corpus"]["vocab_size"] += 1
    plan.write_text(json.dumps(body))
    with pytest.raises(ArgumentError, match="cannot be compared"):
        read_points(names, root=tmp_path)


@pytest.fixture
def law_points() -> list[RunPoint]:
    scales = [ModelScale(num_parameters=1e5 * 2**step, num_tokens=1e6 * 2**step) for step in range(4)]
    return [
        RunPoint(
            name=f"r{i}",
            num_parameters=round(s.num_parameters),
            num_tokens=round(s.num_tokens),
            loss=HOFFMANN.loss(s),
        )
        for i, s in enumerate(scales)
    ]


def test_law__written_and_read__equal(tmp_path: Path, law_points: list[RunPoint]) -> None:
    law, file = fit_law(law_points), tmp_path / "law.yaml"
    write_law(file, law, runs=law_points)
    write_law(file, law, runs=law_points)  # over itself
    found = read_law(file)
    assert found.law == law
    assert list(found.runs) == law_points


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: job\n", "its first line"),
        ("# A scaling law\n{", "not the file of a law"),
        ("# A scaling law\n" + "[" * 100_000, "not the file of a law"),
        ('# A scaling law\n{"law": {"name": 3}, "runs": []}', "not the file of a law"),
    ],
)
def test_law__another_file__neither_read_nor_overwritten(
    text: str, problem: str, tmp_path: Path, law_points: list[RunPoint]
) -> None:
    file = tmp_path / "law.yaml"
    file.write_text(text)
    with pytest.raises(ArgumentError, match=problem):
        read_law(file)
    with pytest.raises(ArgumentError, match=problem):
        write_law(file, fit_law(law_points), runs=law_points)
    assert file.read_text() == text


def test_law__negative_constant__refused(tmp_path: Path, law_points: list[RunPoint]) -> None:
    file = tmp_path / "law.yaml"
    write_law(file, replace(fit_law(law_points), token_exponent=-0.1), runs=law_points)
    with pytest.raises(ArgumentError, match=r"token_exponent is -0\.1"):
        read_law(file)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"token_exponent": 50.0}, "token_exponent is 50; expected 0.01 to 2"),
        ({"parameter_exponent": 1e-300}, "parameter_exponent is 1e-300; expected 0.01 to 2"),
        ({"parameter_factor": 1e300}, r"parameter_factor is 1e\+300; expected 0 to 1e\+12"),
        ({"covariance": ((1e300,) * 5,) * 5}, r"covariance has a number beyond 1e\+12"),
        ({"covariance": ((-1.0,) * 5,) * 5}, "covariance has a negative variance"),
        ({"name": "\x1b[2J"}, "the name has control characters"),
    ],
)
def test_law__that_cannot_be_computed_with__refused(
    change: dict[str, Any], problem: str, tmp_path: Path, law_points: list[RunPoint]
) -> None:
    write_law(tmp_path / "law.yaml", replace(fit_law(law_points), **change), runs=law_points)
    with pytest.raises(ArgumentError, match=problem):
        read_law(tmp_path / "law.yaml")


def test_law__without_runs__refused(tmp_path: Path, law_points: list[RunPoint]) -> None:
    write_law(tmp_path / "law.yaml", fit_law(law_points), runs=[])
    with pytest.raises(ArgumentError, match="it has no runs"):
        read_law(tmp_path / "law.yaml")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_law__six_trained_runs__predicts_the_held_out_largest_within_3_percent(tmp_path: Path) -> None:
    for width, tokens in LADDER:
        file = tmp_path / f"ladder-{width}.yaml"
        file.write_text(JOB.format(width=width, mlp=3 * width, tokens=tokens, lr=0.32 / width))
        done = forge("train", file, cwd=tmp_path, timeout_s=400)
        assert done.returncode == 0, done.stderr[-2000:]
    names = [f"ladder-{width}" for width, _ in LADDER]
    done = forge("scaling", "law.yaml", *names, "-o", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checked = json.loads(done.stdout)["held_out"]
    assert checked["name"].startswith("ladder-176")
    assert abs(checked["error"]) < 0.03
    assert read_law(tmp_path / "law.yaml").runs[-1].num_parameters == 986_480
