"""Distillation by real ranks: losses do not depend on the machines, and the teacher is in no checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.source import weights_digest
from forge.checkpoint.storage import open_storage
from forge.errors import CheckpointError
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from tests.support.jobs import VOCAB, synthetic_corpus, tiny_plan
from tests.support.objectives import write_tokenizer
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = synthetic_corpus(folder)
    write_tokenizer(folder / "tokenizer")
    return corpus


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another architecture than the student, and wider."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, n_embd=48, n_layer=1, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def plan_of(corpus: CorpusInfo, teacher: Path, stage: int) -> Plan:
    settings = {"teacher": str(teacher), "digest": weights_digest(str(teacher)), "temperature": 2.0}
    tokenizer = {"from_pretrained": str(Path(corpus.folder) / "tokenizer")}
    return tiny_plan(
        corpus, training__objective="distillation", training__distillation=settings, training__precision="fp32",
        training__zero={"stage": stage}, data__tokenizer=tokenizer,
    )  # fmt: skip


def test_train__any_world_size_and_stage__losses_are_equal_and_the_teacher_stays_out_of_checkpoints(
    corpus: CorpusInfo, teacher: Path, tmp_path: Path
) -> None:
    alone = run_ranks(plan_of(corpus, teacher, 0), tmp_path / "alone", world_size=1)
    assert alone.losses[-1] < alone.losses[0] and len(alone.losses) == 6
    for stage, world_size in ((1, 3), (2, 2)):
        found = run_ranks(plan_of(corpus, teacher, stage), tmp_path / f"{stage}", world_size=world_size)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4), (stage, world_size)
        assert found.steps[-1].held_out_loss == pytest.approx(alone.steps[-1].held_out_loss, rel=1e-4)
    first = run_ranks(plan_of(corpus, teacher, 3), tmp_path / "run", world_size=2, stop_after=3)
    rest = run_ranks(plan_of(corpus, teacher, 3), tmp_path / "run", world_size=1)
    assert first.losses + rest.losses == pytest.approx(alone.losses, rel=1e-4)
    assert {"train/divergence", "train/cross_entropy", "train/agreement"} <= set(alone.steps[0].extra)
    storage = open_storage(str(tmp_path / "run"))
    names = open_checkpoint(storage, list_checkpoints(storage)[0]).shape.parameters
    assert names and not any("transformer" in name or "wte" in name for name in names)


def test_train__another_teacher_than_that_of_the_plan__is_refused(
    corpus: CorpusInfo, teacher: Path, tmp_path: Path
) -> None:
    plan = plan_of(corpus, teacher, 0)
    distillation = plan.job.training.distillation.model_copy(update={"digest": "0" * 32})
    training = plan.job.training.model_copy(update={"distillation": distillation})
    changed = replace(plan, job=plan.job.model_copy(update={"training": training}))
    with pytest.raises(CheckpointError, match="has other content than when the plan was made"):
        run_ranks(changed, tmp_path, world_size=1)
