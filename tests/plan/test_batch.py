"""The split of the global batch."""

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
def test_the_ranks_shares_are_the_batch_in_order_without_gap_or_overlap(split: tuple[int, int, int]) -> None:
    size, world_size, most = split
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    shares = [plan.share(rank) for rank in range(world_size)]
    assert [i for low, high in shares for i in range(low, high)] == list(range(size))


@given(splits)
def test_every_share_fits_into_the_micro_batches(split: tuple[int, int, int]) -> None:
    size, world_size, most = split
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    room = plan.micro_batch_size * plan.gradient_accumulation_steps
    largest = max(high - low for low, high in map(plan.share, range(world_size)))
    assert plan.micro_batch_size <= most
    assert largest <= room


@given(splits)
def test_padding_is_less_than_one_micro_step_a_rank_and_no_micro_step_could_be_saved(
    split: tuple[int, int, int],
) -> None:
    size, world_size, most = split
    plan = plan_batch(size, world_size=world_size, max_micro_batch_size=most)
    largest = max(high - low for low, high in map(plan.share, range(world_size)))
    assert plan.gradient_accumulation_steps == -(-largest // most)
    assert 0 <= plan.padding < world_size * (plan.gradient_accumulation_steps + 1)


def test_more_workers_than_sequences_is_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError, match=r"4 sequences cannot feed 6 workers"):
        plan_batch(4, world_size=6, max_micro_batch_size=1)


def test_a_rank_outside_of_the_world_has_no_share() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        plan_batch(4, world_size=2, max_micro_batch_size=4).share(2)
