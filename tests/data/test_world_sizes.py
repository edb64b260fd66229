"""Whatever machines come and go, the committed steps have consumed what one worker would have, in its order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from forge.data.order import SampleOrder
from forge.plan.batch import plan_batch

NUM_HISTORIES = 10_000


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A while at one world size."""

    world_size: int
    start: int
    """The step of the snapshot that it goes on from."""
    num_steps: int


def history(chance: random.Random, *, global_batch_size: int) -> Iterator[Generation]:
    """Generations that follow one another; most repeat some steps of the one before."""
    step = 0
    for _ in range(chance.randint(1, 8)):
        start = max(0, step - chance.choice([0, 1, 1, 2, 5]))
        num_steps = chance.randint(0, 6)
        yield Generation(world_size=chance.randint(1, global_batch_size), start=start, num_steps=num_steps)
        step = start + num_steps


def committed_positions(generations: Iterator[Generation], *, global_batch_size: int) -> list[int]:
    """What the ranks take, one after the other, without the steps that were made again."""
    steps: list[list[int]] = []
    for generation in generations:
        plan = plan_batch(global_batch_size, world_size=generation.world_size, max_micro_batch_size=4)
        shares = [range(*plan.share(rank)) for rank in range(generation.world_size)]
        del steps[generation.start :]
        for step in range(generation.start + 1, generation.start + generation.num_steps + 1):
            first = (step - 1) * global_batch_size
            steps.append([first + offset for share in shares for offset in share])
    return [position for step in steps for position in step]


def test_ten_thousand_histories_of_world_sizes_consume_the_samples_of_a_run_with_one_worker() -> None:
    chance = random.Random(0)
    num_samples_seen = 0
    for number in range(NUM_HISTORIES):
        size = chance.randint(1, 12)
        order = SampleOrder(num_samples=chance.randint(1, 100), seed=number)
        positions = np.array(
            committed_positions(history(chance, global_batch_size=size), global_batch_size=size), dtype=np.int64
        )
        alone = np.arange(len(positions), dtype=np.int64)
        assert len(positions) % size == 0
        assert np.array_equal(order.samples(positions), order.samples(alone)), f"history {number}"
        num_samples_seen += len(positions)
    assert num_samples_seen > 10 * NUM_HISTORIES
