"""Which rank trains on what: the same sequences at any world size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.data.loader import HeldOutBatches, MicroBatch, StepTotals, TrainBatches
from forge.data.order import SampleOrder
from forge.data.prepare import open_rows
from forge.data.rows import IGNORED, RowStore
from forge.plan.batch import plan_batch
from tests.support.jobs import SEQ_LEN, synthetic_corpus


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[RowStore, RowStore]:
    folder: Path = tmp_path_factory.mktemp("corpus")
    return open_rows(synthetic_corpus(folder))


def batches_of_step(rows: RowStore, *, step: int, size: int, world_size: int, most: int) -> list[MicroBatch]:
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    order = SampleOrder(num_samples=rows.num_rows, seed=3)
    return [
        batch
        for rank in range(world_size)
        for batch in TrainBatches(rows=rows, order=order, plan=plan, rank=rank).of_step(step)
    ]


def real_rows(batches: list[MicroBatch]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    return [
        (int(position), tuple(tokens.tolist()), tuple(targets.tolist()))
        for batch in batches
        for position, tokens, targets in zip(
            batch.positions, batch.arrays["tokens"], batch.arrays["targets"], strict=True
        )
        if position >= 0
    ]


@settings(max_examples=60, deadline=None)
@given(step=st.integers(1, 500), size=st.integers(1, 24), most=st.integers(1, 8), data=st.data())
def test_a_step_is_the_same_rows_in_the_same_order_at_any_world_size(
    rows: tuple[RowStore, RowStore], step: int, size: int, most: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, size))
    one = real_rows(batches_of_step(rows[0], step=step, size=size, world_size=1, most=size))
    many = real_rows(batches_of_step(rows[0], step=step, size=size, world_size=world_size, most=most))
    assert [position for position, _, _ in one] == list(range((step - 1) * size, step * size))
    assert many == one


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 24), most=st.integers(1, 8), data=st.data())
def test_rows_that_fill_up_carry_no_target_and_every_rank_takes_as_many_micro_steps(
    rows: tuple[RowStore, RowStore], size: int, most: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, size))
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    batches = batches_of_step(rows[0], step=1, size=size, world_size=world_size, most=most)
    assert len(batches) == world_size * plan.gradient_accumulation_steps
    assert all(batch.arrays["tokens"].shape == (plan.micro_batch_size, SEQ_LEN) for batch in batches)
    for batch in batches:
        assert (batch.arrays["targets"][batch.positions < 0] == IGNORED).all()
        assert (batch.arrays["targets"][batch.positions >= 0] >= 0).all()
    assert sum(int((batch.positions < 0).sum()) for batch in batches) == plan.padding


def test_targets_are_the_tokens_one_further(rows: tuple[RowStore, RowStore]) -> None:
    for _, tokens, targets in real_rows(batches_of_step(rows[0], step=2, size=8, world_size=2, most=4)):
        assert tokens[1:] == targets[:-1]


def test_an_epoch_sees_every_sequence_once(rows: tuple[RowStore, RowStore]) -> None:
    total = rows[0].num_rows
    order = SampleOrder(num_samples=total, seed=3)
    assert sorted(order.samples(np.arange(total))) == list(range(total))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_held_out_sequences_are_seen_once_by_all_ranks_together(
    rows: tuple[RowStore, RowStore], world_size: int
) -> None:
    ranks = [
        HeldOutBatches(rows=rows[1], rank=rank, world_size=world_size, micro_batch_size=4)
        for rank in range(world_size)
    ]
    per_rank = [list(rank) for rank in ranks]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = sorted(int(p) for batches in per_rank for batch in batches for p in batch.positions if p >= 0)
    assert seen == list(range(rows[1].num_rows))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_held_out_batches__of_a_mixture__have_rows_of_one_part(
    rows: tuple[RowStore, RowStore], world_size: int
) -> None:
    parts = {"first": 5, "none": 0, "rest": rows[1].num_rows - 5}
    of_rank = [
        HeldOutBatches(rows=rows[1], rank=rank, world_size=world_size, micro_batch_size=3, parts=parts)
        for rank in range(world_size)
    ]
    per_rank = [list(rank) for rank in of_rank]
    assert {len(batches) for batches in per_rank} == {of_rank[0].num_batches}
    seen = [(int(p), batch.part) for batches in per_rank for batch in batches for p in batch.positions if p >= 0]
    assert sorted(seen) == [(row, "first" if row < 5 else "rest") for row in range(rows[1].num_rows)]


@settings(max_examples=30, deadline=None)
@given(step=st.integers(1, 500), size=st.integers(1, 24), data=st.data())
def test_totals__any_world_size__are_those_of_the_rows_of_the_step(
    rows: tuple[RowStore, RowStore], step: int, size: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, size))
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=8)
    order = SampleOrder(num_samples=rows[0].num_rows, seed=3)
    totals = {TrainBatches(rows=rows[0], order=order, plan=plan, rank=r).totals(step) for r in range(world_size)}
    num_tokens = size * SEQ_LEN
    assert totals == {StepTotals(weight=float(num_tokens), num_targets=num_tokens, num_tokens=num_tokens)}
