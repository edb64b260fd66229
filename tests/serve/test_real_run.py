"""A real LoRA run: its adapters merged into the base, and the check of a server before it takes requests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge.errors import ArgumentError, RunError
from forge.inference.loaded import LoadedModel, load
from forge.serve.engine import ServingEngine
from forge.serve.start_check import StartCheck
from tests.support.lora_runs import train_lora_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_lora_runs(tmp_path_factory.mktemp("runs"), names=("one",))


@torch.no_grad()
def logits_of(loaded: LoadedModel) -> torch.Tensor:
    found: torch.Tensor = loaded.model(torch.arange(1, 13).view(1, 12)).logits
    return found


def test_load__adapters_of_a_run__is_the_run(base: Path) -> None:
    run, plain = load(base.parent / "one", device="cpu"), load(base, device="cpu")
    merged = load(base, device="cpu", adapters=[base.parent / "one"])
    torch.testing.assert_close(logits_of(merged), logits_of(run), rtol=0, atol=2e-5)
    assert (logits_of(merged) - logits_of(plain)).abs().max() > 0.01
    assert merged.name == "base+one" and len({one.digest for one in (run, plain, merged)}) == 3


def test_load__adapters_of_another_base__refused(base: Path, tmp_path: Path) -> None:
    other = load(base, device="cpu").model
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((base / name).read_bytes())
    with pytest.raises(ArgumentError, match="trained on other weights"):
        load(tmp_path / "other", device="cpu", adapters=[base.parent / "one"])


def test_start_check__weights_of_a_run_changed__fails(base: Path) -> None:
    run = base.parent / "one"
    loaded = load(run, device="cpu")
    check = StartCheck.prepare(loaded, source=str(run))
    engine = ServingEngine(loaded)
    try:
        assert "of held-out text differ from the model's by at most" in check.run(engine)
        with torch.no_grad():
            next(weight for name, weight in loaded.model.named_parameters() if "down_proj" in name).mul_(3)
        with pytest.raises(RunError, match="would not serve the trained model"):
            check.run(engine)
    finally:
        engine.close()
