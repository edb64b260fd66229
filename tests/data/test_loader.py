"""Which rank trains on what: the same sequences at any world size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.data.loader import IGNORED, HeldOutBatches, MicroBatch, TrainBatches
from forge.data.order import SampleOrder
from forge.data.prepare import open_streams
from forge.data.store import TokenStream
from forge.plan.batch import plan_batch
from tests.support.jobs import SEQ_LEN, synthetic_corpus


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenStream, TokenStream]:
    folder: Path = tmp_path_factory.mktemp("corpus")
    return open_streams(synthetic_corpus(folder))


def batches_of_step(stream: TokenStream, *, step: int, size: int, world_size: int, most: int) -> list[MicroBatch]:
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    order = SampleOrder(num_samples=stream.num_sequences(SEQ_LEN), seed=3)
    return [
        batch
        for rank in range(world_size)
        for batch in TrainBatches(stream=stream, order=order, plan=plan, rank=rank, seq_len=SEQ_LEN).of_step(step)
    ]


def real_rows(batches: list[MicroBatch]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    return [
        (int(position), tuple(tokens.tolist()), tuple(targets.tolist()))
        for batch in batches
        for position, tokens, targets in zip(batch.positions, batch.tokens, batch.targets, strict=True)
        if position >= 0
    ]


@settings(max_examples=60, deadline=None)
@given(step=st.integers(1, 500), size=st.integers(1, 24), most=st.integers(1, 8), data=st.data())
def test_a_step_is_the_same_rows_in_the_same_order_at_any_world_size(
    streams: tuple[TokenStream, TokenStream], step: int, size: int, most: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, size))
    one = real_rows(batches_of_step(streams[0], step=step, size=size, world_size=1, most=size))
    many = real_rows(batches_of_step(streams[0], step=step, size=size, world_size=world_size, most=most))
    assert [position for position, _, _ in one] == list(range((step - 1) * size, step * size))
    assert many == one


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 24), most=st.integers(1, 8), data=st.data())
def test_rows_that_fill_up_carry_no_target_and_every_rank_takes_as_many_micro_steps(
    streams: tuple[TokenStream, TokenStream], size: int, most: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, size))
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    batches = batches_of_step(streams[0], step=1, size=size, world_size=world_size, most=most)
    assert len(batches) == world_size * plan.gradient_accumulation_steps
    assert all(batch.tokens.shape == (plan.micro_batch_size, SEQ_LEN) for batch in batches)
    for batch in batches:
        assert (batch.targets[batch.positions < 0] == IGNORED).all()
        assert (batch.targets[batch.positions >= 0] >= 0).all()
    assert sum(int((batch.positions < 0).sum()) for batch in batches) == plan.padding


def test_targets_are_the_tokens_one_further(streams: tuple[TokenStream, TokenStream]) -> None:
    for _, tokens, targets in real_rows(batches_of_step(streams[0], step=2, size=8, world_size=2, most=4)):
        assert tokens[1:] == targets[:-1]


def test_an_epoch_sees_every_sequence_once(streams: tuple[TokenStream, TokenStream]) -> None:
    total = streams[0].num_sequences(SEQ_LEN)
    order = SampleOrder(num_samples=total, seed=3)
    assert sorted(order.samples(np.arange(total))) == list(range(total))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_held_out_sequences_are_seen_once_by_all_ranks_together(
    streams: tuple[TokenStream, TokenStream], world_size: int
) -> None:
    ranks = [
        HeldOutBatches(stream=streams[1], rank=rank, world_size=world_size, micro_batch_size=4, seq_len=SEQ_LEN)
        for rank in range(world_size)
    ]
    per_rank = [list(rank) for rank in ranks]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = sorted(int(p) for batches in per_rank for batch in batches for p in batch.positions if p >= 0)
    assert seen == list(range(streams[1].num_sequences(SEQ_LEN)))
