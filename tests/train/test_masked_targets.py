"""With masked targets the loss of a step is its sum over its weight, at any world size and ZeRO stage."""

from __future__ import annotations

import pytest

from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from tests.support.examples import masked_corpus
from tests.support.jobs import tiny_plan
from tests.support.ranks import Recording, run_ranks


def plan_of(corpus: CorpusInfo, *, stage: int, micro_batch_size: int) -> Plan:
    return tiny_plan(
        corpus,
        data__packing=corpus.packing,
        training__precision="fp32",
        training__total_steps=4,
        training__zero={"stage": stage},
        training__micro_batch_size=micro_batch_size,
        resources__workers="1..5",
    )


@pytest.fixture(scope="module", params=["examples", "none"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return masked_corpus(tmp_path_factory.mktemp("masked"), packing=request.param)


@pytest.fixture(scope="module")
def reference(corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """One rank and one micro-batch."""
    plan = plan_of(corpus, stage=0, micro_batch_size=12)
    assert plan.for_world_size(1).batch.gradient_accumulation_steps == 1
    return run_ranks(plan, tmp_path_factory.mktemp("reference"), world_size=1)


IN_CI = {(1, 2), (2, 1), (3, 3)}


@pytest.mark.parametrize(
    ("world_size", "stage"),
    [
        pytest.param(size, stage, marks=() if (size, stage) in IN_CI else pytest.mark.slow)
        for size in (1, 2, 3, 5)
        for stage in (0, 1, 2, 3)
    ],
)
def test_train__masked_targets__same_losses_as_one_rank_and_one_batch(
    corpus: CorpusInfo, reference: Recording, tmp_path_factory: pytest.TempPathFactory, world_size: int, stage: int
) -> None:
    plan = plan_of(corpus, stage=stage, micro_batch_size=2)
    found = run_ranks(plan, tmp_path_factory.mktemp("found"), world_size=world_size)
    assert found.losses == pytest.approx(reference.losses, rel=1e-5)
    assert [m.grad_norm for m in found.steps] == pytest.approx([m.grad_norm for m in reference.steps], rel=1e-4)
    assert found.steps[-1].held_out_loss == pytest.approx(reference.steps[-1].held_out_loss, rel=1e-5)
    metric = "eval/perplexity"
    assert found.steps[-1].extra[metric] == pytest.approx(reference.steps[-1].extra[metric], rel=1e-4)
    assert [m.num_tokens for m in found.steps] == [m.num_tokens for m in reference.steps]
    # Masked positions and padding are not counted.
    assert 0 < found.steps[-1].num_tokens < 4 * 12 * corpus.seq_len
