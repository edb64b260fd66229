"""Frozen parameters of a saved folder: in no checkpoint, and read from the unchanged folder only."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forge.checkpoint.manifest import BaseWeights, base_difference
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import find_checkpoint
from forge.errors import CheckpointError
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from forge.serve.export import ExportRequest, export
from forge.train.worker import _load_from_memory
from tests.support.jobs import synthetic_corpus, tiny_plan
from tests.support.ranks import run_ranks
from tests.train.test_pretrained import save_first_weights

ALL_BUT_NORMS = ["model.embed_tokens", "lm_head", "*.self_attn", "*.mlp"]
"""160 of 28,832 parameters are trained."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return synthetic_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    save_first_weights(folder, "bf16")
    return folder


@pytest.fixture(scope="module")
def half(base: Path, corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after step 3, at one worker and ZeRO 2."""
    folder: Path = tmp_path_factory.mktemp("half")
    run_ranks(plan_of(base, corpus, stage=2), folder, world_size=1, stop_after=3)
    return folder


def plan_of(base: Path, corpus: CorpusInfo, *, stage: int, freeze: list[str] = ALL_BUT_NORMS) -> Plan:
    model = {"from_pretrained": str(base), "freeze": freeze}
    return tiny_plan(corpus, model=model, training__zero={"stage": stage}, training__ema={"decay": 0.9})


def newest(folder: Path) -> Any:
    checkpoint = find_checkpoint(open_storage(str(folder)), on_skip=lambda name, why: pytest.fail(why))
    assert checkpoint is not None
    return checkpoint


def test_checkpoint__nearly_all_parameters_frozen__holds_the_trained_ones_alone(base: Path, half: Path) -> None:
    checkpoint = newest(half)
    assert checkpoint.kinds == {"master", "exp_avg", "exp_avg_sq", "ema"}
    held = sum(part.layout.size_bytes for part in checkpoint.manifest.parts)
    assert held == 16 * 5 * 32  # fp32 master, two moments and the average of five norms
    whole = 16 * sum(tensor.numel() for file in base.glob("*.safetensors") for tensor in load_file(file).values())
    assert held < 0.01 * whole
    assert checkpoint.shape.base.source == str(base)
    assert set(checkpoint.shape.base.files) == {file.name for file in base.glob("*.safetensors")}


@pytest.mark.slow
def test_resume__more_workers_and_another_stage__reads_the_frozen_weights_again(
    base: Path, corpus: CorpusInfo, half: Path, tmp_path: Path
) -> None:
    whole = run_ranks(plan_of(base, corpus, stage=3), tmp_path / "whole", world_size=2)
    shutil.copytree(half, tmp_path / "resumed")
    rest = run_ranks(plan_of(base, corpus, stage=3), tmp_path / "resumed", world_size=2)
    assert [metrics.step for metrics in rest.steps] == [4, 5, 6]
    assert rest.losses == pytest.approx(whole.losses[3:], rel=1e-2)


def test_train__frozen_weights__are_those_of_the_folder_at_every_stage(
    base: Path, corpus: CorpusInfo, tmp_path: Path
) -> None:
    runs = [
        run_ranks(plan_of(base, corpus, stage=stage), tmp_path / str(stage), world_size=2, stop_after=2)
        for stage in (0, 3)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-2)


def test_resume__base_file_has_changed__is_refused_by_name(
    base: Path, corpus: CorpusInfo, half: Path, tmp_path: Path
) -> None:
    file = sorted(base.glob("*.safetensors"))[0]
    before = file.read_bytes()
    tensors = load_file(file)
    try:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{file.name} of .* had the digest \w{{32}}, now \w{{32}}"):
            run_ranks(plan_of(base, corpus, stage=2), half, world_size=1)
        with pytest.raises(CheckpointError, match=file.name):
            export(ExportRequest(url=str(half), to=str(tmp_path / "out")))
    finally:
        file.write_bytes(before)


def test_export__frozen_run__is_a_whole_model(base: Path, half: Path, tmp_path: Path) -> None:
    export(ExportRequest(url=str(half), to=str(tmp_path / "out"), dtype="fp32"))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name in ours if "norm" in name}


def test_train__frozen_weights_from_a_seed__are_kept_in_the_checkpoint(corpus: CorpusInfo, tmp_path: Path) -> None:
    plan = tiny_plan(corpus, model__freeze=["model.embed_tokens"])
    run_ranks(plan, tmp_path, world_size=1, stop_after=1)
    checkpoint = newest(tmp_path)
    assert "frozen" in checkpoint.kinds
    assert checkpoint.shape.base is None


def test_load_from_memory__base_weights_changed_while_the_run_trained__are_refused() -> None:
    def weights(digest: str) -> BaseWeights:
        return BaseWeights(source="/base", revision=None, files={"model.safetensors": digest})

    engine: Any = SimpleNamespace(state=SimpleNamespace(shape=SimpleNamespace(base=weights("b" * 32))))
    source: Any = SimpleNamespace(base=weights("a" * 32), progress=None)
    with pytest.raises(CheckpointError, match=r"model\.safetensors of /base.*had the digest aaaa.*now bbbb"):
        _load_from_memory(engine, source)
    assert base_difference(weights("a"), weights("a")) is None
    assert "is missing" in str(base_difference(weights("a"), BaseWeights(source="/base", revision=None, files={})))
