"""examples/custom-model and examples/custom-objective: the classes do what they say, and train through the CLI."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from forge.code_archive import ARCHIVE, pack_code, unpack_code
from forge.config.load import load_job
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.registry import family_of
from forge.objective.build import build_objective
from forge.plan.plan import plan_from_json
from forge.runs.reader import read_metrics, read_run
from forge.user_code import use_code
from tests.support.command import forge

ROOT = Path(__file__).resolve().parents[2]
TEXT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n" * 300
DATA = DataShape(vocab_size=50, seq_len=8, eot_id=0)
NUM_STEPS = 12


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with both examples and a small corpus, and a cache of its own."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    for name in ("custom-model", "custom-objective"):
        shutil.copytree(ROOT / "examples" / name, tmp_path / "examples" / name)
    (tmp_path / "corpus.txt").write_text(TEXT)
    yield tmp_path
    use_code(None)


def train(home: Path, example: str) -> Path:
    """Train an example on the small corpus for a few steps through the CLI. Returns: the run folder."""
    job = (home / "examples" / example / "job.yaml").read_text()
    assert "source: python-stdlib" in job
    (home / "job.yaml").write_text(job.replace("source: python-stdlib", "files: corpus.txt"))
    done = forge(
        "train", "job.yaml", "--set", f"training.total_steps={NUM_STEPS}", "--set", "resources.workers=2",
        "--set", "data.tokenizer.vocab_size=300", "--set", "data.seq_len=32", "--set", "data.held_out=10%",
        cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (home / "runs").iterdir()
    return folder


def test_tiny_mixer__later_token_changes__earlier_logits_stay(home: Path) -> None:
    use_code(packed(home, "custom-model"))
    spec = load_job(ROOT / "examples" / "custom-model" / "job.yaml").job.model
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=1)
    model = family_of(spec).build(spec, DATA, options=options)
    tokens = torch.arange(1, 9).view(1, 8)
    changed = tokens.clone()
    changed[0, 5] = 40
    before, after = model(tokens), model(changed)
    assert before.shape == (1, 8, 50)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


def test_smoothed_lm__padding_and_two_halves__agree_with_torch_and_add_up(home: Path) -> None:
    use_code(packed(home, "custom-objective"))
    objective = build_objective("my_losses:SmoothedLm")
    table = torch.nn.Parameter(torch.randn(50, 50, generator=torch.Generator().manual_seed(0)))

    def model(*, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=table[input_ids])

    rng = np.random.default_rng(0)
    rows = {"tokens": rng.integers(50, size=(4, 8)), "targets": rng.integers(50, size=(4, 8))}
    rows["targets"][3] = rows["targets"][0, 4:] = -100
    whole = objective.loss(model, objective.batch(rows))  # type: ignore[arg-type]
    halves = [
        objective.loss(model, objective.batch({name: array[part] for name, array in rows.items()}))  # type: ignore[arg-type]
        for part in (slice(0, 2), slice(2, 4))
    ]
    logits = table[torch.from_numpy(rows["tokens"])].flatten(0, 1)
    targets = torch.from_numpy(rows["targets"]).flatten()
    assert whole.weight == 20
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(whole.sum / whole.weight, expected)
    torch.testing.assert_close(sum(half.sum for half in halves), whole.sum)
    hits = (logits.argmax(dim=-1) == targets).sum()
    assert whole.metrics["accuracy"].sum == hits == sum(half.metrics["accuracy"].sum for half in halves)


@pytest.mark.slow  # tests/runtime/test_user_code_end_to_end.py takes the same path
def test_custom_model__trained_by_two_workers__learns_and_writes_text(home: Path) -> None:
    source = home / "examples" / "custom-model" / "src" / "my_models.py"
    source.write_text(source.read_text() + "\nprint('noise')\n")  # must not end up in any answer
    folder = train(home, "custom-model")
    losses = [record["train/loss"] for record in read_metrics(folder)]
    assert read_run(folder).status == "finished"
    assert len(losses) == NUM_STEPS and losses[-1] < losses[0] - 0.5
    plan = plan_from_json((folder / "plan.json").read_text())
    assert plan.model.class_name == "TinyMixer" and plan.code is not None
    assert plan.code.digest == pack_code(home / "examples" / "custom-model" / "src").digest
    assert (folder / ARCHIVE).is_file()

    # The source folder and the cache may change: a run keeps the code that it began with.
    source.write_text("raise SystemExit\n")
    shutil.rmtree(home / "cache" / "code")
    written = forge("generate", "latest", "--prompt", "def ", "--max-tokens", "40", cwd=home)
    assert written.returncode == 0, written.stderr
    assert len(written.stdout) > len("def ") and "noise" not in written.stdout

    exported = forge("checkpoints", "export", "latest", "--to", "out", "--dtype", "fp32", cwd=home)
    assert exported.returncode == 0, exported.stderr
    use_code(plan.code.digest)
    spec = plan.job.model
    data = DataShape(vocab_size=plan.corpus.vocab_size, seq_len=32, eot_id=plan.corpus.eot_id)
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=7)
    model = family_of(spec).build(spec, data, options=options)
    model.load_state_dict(load_file(home / "out" / "model.safetensors"))  # every name, none else

    # What only shows a run neither imports nor unpacks its code.
    shutil.rmtree(home / "cache" / "code")
    for words in (["runs", "list"], ["runs", "show", "latest"], ["checkpoints", "list", "latest"]):
        assert forge(*words, cwd=home).returncode == 0
    assert not (home / "cache" / "code").exists()


@pytest.mark.slow  # tests/runtime/test_user_code_end_to_end.py takes the same path
def test_custom_objective__trained_by_two_workers__learns_and_reports_its_metric(home: Path) -> None:
    folder = train(home, "custom-objective")
    records = read_metrics(folder)
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5
    assert all(0 <= record["train/accuracy"] <= 1 for record in records)
    evaluated = [
        event
        for event in map(json.loads, (folder / "events.jsonl").read_text().splitlines())
        if event["event"] == "Evaluated"
    ]
    assert evaluated and math.isfinite(evaluated[-1]["loss"])


def packed(home: Path, example: str) -> str:
    code = pack_code(home / "examples" / example / "src")
    unpack_code(code)
    return code.digest
