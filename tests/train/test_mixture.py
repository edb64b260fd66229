"""A mixture is read in the same order, with the same losses, at any number of workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forge.data.mixture import mix
from forge.data.mixture_order import build_order
from forge.events import Evaluated
from forge.plan.inputs import CorpusInfo, CorpusPart
from forge.plan.plan import Plan
from tests.support.jobs import synthetic_corpus, tiny_plan
from tests.support.ranks import Recording, run_ranks

PARTS = [{"name": "large", "files": "a.txt", "weight": 3}, {"name": "small", "files": "b.txt", "weight": 2}]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("corpora")
    large = synthetic_corpus(folder / "large")
    small = synthetic_corpus(folder / "small", num_tokens=400, num_held_out=90)
    parts = [CorpusPart(name="large", corpus=large), CorpusPart(name="small", corpus=small)]
    mixed = mix(parts, home=folder)
    return tiny_plan(
        mixed,
        data={"mixture": PARTS, "seq_len": 16, "tokenizer": {"vocab_size": 300}},
        training__precision="fp32",
        training__evaluate_every="3 steps",
        checkpoint__every="2 steps",
    )


@pytest.fixture(scope="module")
def reference(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return run_ranks(plan, tmp_path_factory.mktemp("reference"), world_size=1)


def evaluations(recording: Recording) -> list[Evaluated]:
    return [event for event in recording.events if isinstance(event, Evaluated)]


def sizes(corpus: CorpusInfo) -> list[int]:
    return [part.corpus.num_held_out_sequences for part in corpus.parts]


def test_run__mixture__reads_the_planned_rows_and_evaluates_every_part(plan: Plan, reference: Recording) -> None:
    expected = build_order(plan.job.data, plan.corpus).samples(np.arange(72)).reshape(6, 12)
    assert [reference.sample_ids[step + 1] for step in range(6)] == expected.tolist()
    num_large = plan.corpus.parts[0].corpus.num_train_sequences
    assert abs((expected < num_large).mean() - 0.6) < 0.03
    (last,) = evaluations(reference)[-1:]
    losses = [last.metrics["loss/large"], last.metrics["loss/small"]]
    assert last.loss == pytest.approx(np.average(losses, weights=sizes(plan.corpus)), rel=1e-9)
    assert abs(losses[0] - losses[1]) > 1e-4
    assert reference.steps[-1].extra["eval/loss/small"] == losses[1]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_losses__mixture_at_any_world_size__are_equal(
    plan: Plan, reference: Recording, tmp_path: Path, world_size: int
) -> None:
    found = run_ranks(plan, tmp_path, world_size=world_size)
    assert found.sample_ids == reference.sample_ids
    assert found.losses == pytest.approx(reference.losses, rel=1e-5)
    for own, other in zip(evaluations(found), evaluations(reference), strict=True):
        assert own.metrics == pytest.approx(other.metrics, rel=1e-5)


@pytest.mark.slow
def test_resume__mixture_at_another_world_size__keeps_order_and_losses(
    plan: Plan, reference: Recording, tmp_path: Path
) -> None:
    begun = run_ranks(plan, tmp_path, world_size=2, stop_after=4)
    resumed = run_ranks(plan, tmp_path, world_size=3)
    assert [*begun.losses, *resumed.losses] == pytest.approx(reference.losses, rel=1e-5)
    assert {**begun.sample_ids, **resumed.sample_ids} == reference.sample_ids


@pytest.mark.slow
def test_losses__one_part__are_those_of_the_corpus_alone(plan: Plan, tmp_path: Path) -> None:
    part = plan.corpus.parts[0]
    alone = run_ranks(tiny_plan(part.corpus, training__precision="fp32"), tmp_path / "alone", world_size=1)
    mixed = mix([replace(part, name="only")], home=tmp_path)
    data = {"mixture": [{"name": "only", "files": "a.txt"}], "seq_len": 16, "tokenizer": {"vocab_size": 300}}
    found = run_ranks(tiny_plan(mixed, data=data, training__precision="fp32"), tmp_path / "mixture", world_size=1)
    assert found.sample_ids == alone.sample_ids
    assert found.losses == alone.losses
