"""Masked-token prediction by real ranks: the losses do not depend on the machines, with dropout too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from tests.support.jobs import synthetic_corpus, tiny_plan
from tests.support.objectives import write_tokenizer
from tests.support.ranks import run_ranks

BERT = {
    "architecture": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = synthetic_corpus(folder)
    write_tokenizer(folder / "tokenizer")
    return corpus


def plan_of(corpus: CorpusInfo, stage: int, **changes: object) -> Plan:
    plan = tiny_plan(
        corpus, model=BERT, training__objective="masked-lm", training__precision="fp32",
        training__zero={"stage": stage}, **changes,
    )  # fmt: skip
    return replace(plan, model=replace(plan.model, has_positionwise_head=True, vocab_size=300))


@pytest.mark.slow
def test_train__any_world_size_and_stage__losses_are_equal_and_a_resize_keeps_the_curve(
    corpus: CorpusInfo, tmp_path: Path
) -> None:
    alone = run_ranks(plan_of(corpus, 0), tmp_path / "alone", world_size=1)
    assert alone.losses[-1] < alone.losses[0] and len(alone.losses) == 6
    for stage, world_size in ((0, 2), (1, 3), (2, 2), (3, 3)):
        found = run_ranks(plan_of(corpus, stage), tmp_path / f"{stage}", world_size=world_size)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4), (stage, world_size)
        assert found.steps[-1].held_out_loss == pytest.approx(alone.steps[-1].held_out_loss, rel=1e-4)
    first = run_ranks(plan_of(corpus, 1), tmp_path / "run", world_size=2, stop_after=3)
    rest = run_ranks(plan_of(corpus, 3), tmp_path / "run", world_size=1)
    assert first.losses + rest.losses == pytest.approx(alone.losses, rel=1e-4)
    assert 0 <= alone.steps[0].extra["train/accuracy"] < 0.5
