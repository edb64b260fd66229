"""Distillation by real ranks: losses do not depend on the machines, and the teacher is in no checkpoint."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.source import weights_digest
from forge.checkpoint.storage import open_storage
from forge.data.cache_index import read_index
from forge.data.further_columns import num_positions
from forge.data.prepare import open_rows
from forge.data.rows import IGNORED
from forge.errors import CheckpointError
from forge.objective.distillation import TEACHER_LOG_PROBS, TEACHER_TOKENS
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from forge.train.stored_outputs import OutputsRequest, corpus_with_outputs
from tests.support.examples import masked_corpus
from tests.support.jobs import VOCAB, synthetic_corpus, tiny_plan
from tests.support.objectives import write_tokenizer
from tests.support.ranks import run_ranks
from tests.train.test_pretrained import save_first_weights


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = synthetic_corpus(folder)
    write_tokenizer(folder / "tokenizer")
    return corpus


@pytest.fixture(scope="module")
def llama_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that keeps the examples of a row apart."""
    folder: Path = tmp_path_factory.mktemp("llama")
    save_first_weights(folder, "fp32")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another architecture than the student, and wider."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, n_embd=48, n_layer=1, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def plan_of(corpus: CorpusInfo, teacher: Path, stage: int, **settings: Any) -> Plan:
    given = {"teacher": str(teacher), "digest": weights_digest(str(teacher)), "temperature": 2.0, **settings}
    tokenizer = {"from_pretrained": str(Path(corpus.folder) / "tokenizer")}
    return tiny_plan(
        corpus, training__objective="distillation", training__distillation=given, training__precision="fp32",
        training__zero={"stage": stage}, data__tokenizer=tokenizer, data__packing=corpus.packing,
    )  # fmt: skip


def with_outputs(corpus: CorpusInfo, teacher: Path, *, top_k: int = 5, **changes: Any) -> CorpusInfo | None:
    """The corpus with the teacher's outputs at the temperature of `plan_of`."""
    request = OutputsRequest(
        parent=os.getpid(), model={"from_pretrained": str(teacher)}, precision="fp32", seed=1, uses_gpu=False,
        corpus={name: None if value != value else value for name, value in asdict(corpus).items()},
        has_linear_head=False, keeps_examples_apart=corpus.packing == "examples", top_k=top_k, temperature=2.0,
    )  # fmt: skip
    return corpus_with_outputs(replace(request, **changes))


@pytest.fixture(scope="module", params=["concatenate", "examples", "none"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    """Token streams, and examples of which only some targets carry loss, in rows together or alone."""
    folder: Path = tmp_path_factory.mktemp("prepared") / "corpus-0"
    if request.param == "concatenate":
        corpus = synthetic_corpus(folder)
    else:
        corpus = masked_corpus(folder, packing=request.param)
    write_tokenizer(folder / "tokenizer")
    return corpus


def test_stored_outputs__any_packing__are_the_most_probable_tokens_of_transformers(
    prepared: CorpusInfo, llama_teacher: Path
) -> None:
    assert with_outputs(prepared, llama_teacher, only_if_computed=True) is None
    found = with_outputs(prepared, llama_teacher)
    assert found is not None and found.digest != prepared.digest
    model = AutoModelForCausalLM.from_pretrained(llama_teacher).eval()
    for rows, plain in zip(open_rows(found), open_rows(prepared), strict=True):
        chosen = np.array([0, 3, rows.num_rows - 1])
        read, before = rows.read(chosen), plain.read(chosen)
        assert all((read[name] == values).all() for name, values in before.items())
        segments = read.get("segment_ids", np.ones_like(read["tokens"]))
        for i in range(len(chosen)):
            for segment in range(1, segments[i].max() + 1):
                mine = segments[i] == segment
                with torch.no_grad():
                    logits = model(input_ids=torch.from_numpy(read["tokens"][i][mine])[None]).logits[0]
                top, tokens = (logits / 2).log_softmax(-1).topk(5, dim=-1)
                kept = read["targets"][i][mine] != IGNORED
                np.testing.assert_array_equal(read[TEACHER_TOKENS][i][mine][kept], tokens.numpy()[kept])
                np.testing.assert_allclose(read[TEACHER_LOG_PROBS][i][mine][kept], top.numpy()[kept], atol=1e-5)
                assert not read[TEACHER_LOG_PROBS][i][mine][~kept].any()
    files = [Path(found.folder) / "columns" / f"{name}.bin" for name in (TEACHER_TOKENS, TEACHER_LOG_PROBS)]
    size = sum(file.stat().st_size for file in files)
    index = read_index(Path(prepared.folder))
    assert size == 8 * 5 * num_positions(index, seq_len=prepared.seq_len)
    assert with_outputs(prepared, llama_teacher, only_if_computed=True) == found
    for changes in ({"temperature": 1.0}, {"top_k": 4}, {"precision": "bf16"}):
        assert with_outputs(prepared, llama_teacher, only_if_computed=True, **changes) is None


@pytest.mark.slow
def test_train__stored_outputs_at_any_world_size_and_stage__have_the_curve_of_the_live_teacher(
    prepared: CorpusInfo, llama_teacher: Path, tmp_path: Path
) -> None:
    found = with_outputs(prepared, llama_teacher)
    assert found is not None

    settings: dict[str, Any] = {"top_k": 5, "teacher_logits": "stored"}
    plans = [plan_of(found, llama_teacher, stage, **settings) for stage in range(4)]
    live = run_ranks(plan_of(prepared, llama_teacher, 0, top_k=5), tmp_path / "live", world_size=1)
    moved = llama_teacher.rename(llama_teacher.with_name("moved"))  # no worker needs it
    try:
        for stage, world_size in ((1, 3), (2, 2)):
            run = run_ranks(plans[stage], tmp_path / f"{stage}", world_size=world_size)
            assert run.losses == pytest.approx(live.losses, rel=1e-4), (stage, world_size)
            assert run.steps[-1].held_out_loss == pytest.approx(live.steps[-1].held_out_loss, rel=1e-4)
        first = run_ranks(plans[3], tmp_path / "run", world_size=2, stop_after=3)
        rest = run_ranks(plans[0], tmp_path / "run", world_size=1)
        assert first.losses + rest.losses == pytest.approx(live.losses, rel=1e-4)
    finally:
        moved.rename(llama_teacher)


@pytest.mark.slow
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
