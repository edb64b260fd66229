"""Split of the global batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.errors import PlanError
from forge.plan.batch import plan_batch

splits = st.integers(1, 300).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(1, size), st.integers(1, 64))
)


@given(splits)
def test_share__all_ranks__cover_the_batch_in_order(split: tuple[int, int, int]) -> None:
    size, world_size, most = split
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    shares = [plan.share(rank) for rank in range(world_size)]
    assert [i for low, high in shares for i in range(low, high)] == list(range(size))


@given(splits)
def test_plan_batch__every_share__fits_in_the_micro_batches(split: tuple[int, int, int]) -> None:
    size, world_size, most = split
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    room = plan.micro_batch_size * plan.gradient_accumulation_steps
    largest = max(high - low for low, high in map(plan.share, range(world_size)))
    assert plan.micro_batch_size <= most
    assert largest <= room


@given(splits)
def test_plan_batch__micro_steps_and_padding__are_minimal(
    split: tuple[int, int, int],
) -> None:
    size, world_size, most = split
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    largest = max(high - low for low, high in map(plan.share, range(world_size)))
    assert plan.gradient_accumulation_steps == -(-largest // most)
    assert 0 <= plan.padding < world_size * (plan.gradient_accumulation_steps + 1)


def test_plan_batch__more_workers_than_sequences__is_rejected() -> None:
    with pytest.raises(PlanError, match=r"4 sequences cannot feed 6 workers: it feeds at most 4, and 2 of them"):
        plan_batch(4, world_size=6, max_micro_batch_size=1)


def test_share__rank_outside_the_world__is_rejected() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        plan_batch(4, world_size=2, max_micro_batch_size=4).share(2)
