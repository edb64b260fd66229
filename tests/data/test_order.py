from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from forge.data import order as order_module
from forge.data.order import SampleOrder

SIZES = st.one_of(st.integers(1, 300), st.integers(1, 20_000))
SEEDS = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize("num_samples", [*range(1, 130), 255, 256, 257, 1000])
def test_every_epoch_visits_each_sample_once(num_samples: int) -> None:
    order = SampleOrder(num_samples=num_samples, seed=7)
    for epoch in (0, 1, 2, 1000):
        samples = order.samples(np.arange(num_samples) + epoch * num_samples)
        assert sorted(samples.tolist()) == list(range(num_samples))


@given(num_samples=SIZES, seed=SEEDS, epoch=st.integers(0, 10**9))
def test_every_epoch_of_any_size_and_seed_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    positions = np.arange(num_samples) + epoch * num_samples
    samples = SampleOrder(num_samples=num_samples, seed=seed).samples(positions)
    assert np.array_equal(np.sort(samples), np.arange(num_samples))


@given(num_samples=st.integers(50, 5000), seed=SEEDS)
def test_epochs_differ(num_samples: int, seed: int) -> None:
    order = SampleOrder(num_samples=num_samples, seed=seed)
    positions = np.arange(num_samples)
    assert not np.array_equal(order.samples(positions), order.samples(positions + num_samples))


@given(num_samples=st.integers(50, 5000), seed=st.integers(0, 2**62))
def test_seeds_differ(num_samples: int, seed: int) -> None:
    positions = np.arange(num_samples)
    one, other = (SampleOrder(num_samples=num_samples, seed=s).samples(positions) for s in (seed, seed + 1))
    assert not np.array_equal(one, other)


@given(num_samples=SIZES, seed=SEEDS, positions=st.lists(st.integers(0, 2**62), min_size=1, max_size=50))
def test_a_sample_depends_on_its_own_position_alone(num_samples: int, seed: int, positions: list[int]) -> None:
    order = SampleOrder(num_samples=num_samples, seed=seed)
    together = order.samples(np.array(positions)).tolist()
    assert together == [order.samples(np.array([position]))[0] for position in positions]


def test_more_positions_than_a_block_are_like_one_at_a_time() -> None:
    order = SampleOrder(num_samples=100_003, seed=1)
    positions = np.arange(200_000)
    assert np.array_equal(order.samples(positions)[::9973], order.samples(positions[::9973]))


@given(num_samples=st.integers(1, 2**62), seed=SEEDS, position=st.integers(0, 2**63 - 1))
def test_the_arithmetic_is_that_of_whole_numbers(num_samples: int, seed: int, position: int) -> None:
    found = SampleOrder(num_samples=num_samples, seed=seed).samples(np.array([position]))
    assert found[0] == reference(position, num_samples=num_samples, seed=seed)


def test_the_order_is_the_same_on_every_machine_and_in_every_release() -> None:
    golden = {
        (10, 1): GOLDEN_10,
        (1000, 1): [308, 580, 961, 969, 265, 731, 453, 865],
        (10**12, 1): [691077542052, 950636015744, 322770495513, 213735075810, 625132275229, 471581625104],
    }
    for (num_samples, seed), samples in golden.items():
        order = SampleOrder(num_samples=num_samples, seed=seed)
        assert order.samples(np.arange(len(samples))).tolist() == samples


@pytest.mark.parametrize("num_samples", [6, 12, 30, 100])
def test_pairs_of_neighbours_are_uniform_over_the_epochs(num_samples: int) -> None:
    num_epochs = 50_000
    positions = (np.arange(num_epochs)[:, None] * num_samples + np.array([0, 1])).ravel()
    pairs = SampleOrder(num_samples=num_samples, seed=3).samples(positions).reshape(num_epochs, 2)
    counts = np.bincount(pairs[:, 0] * num_samples + pairs[:, 1], minlength=num_samples**2)
    possible = counts[~np.eye(num_samples, dtype=bool).ravel()]
    expected = num_epochs / len(possible)
    freedom = len(possible) - 1
    chi_squared = float(((possible - expected) ** 2 / expected).sum())
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


def test_neighbours_are_not_left_beside_each_other() -> None:
    num_samples = 100_000
    samples = SampleOrder(num_samples=num_samples, seed=5).samples(np.arange(num_samples))
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(samples, np.arange(num_samples))[0, 1]) < 0.02


def test_samples__a_large_corpus__needs_hardly_more_than_one_walk_per_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_walked = 0

    def counted(values: NDArray[np.uint64], **sizes: Any) -> NDArray[np.uint64]:
        nonlocal num_walked
        num_walked += len(values)
        return network(values, **sizes)

    network = order_module._network
    monkeypatch.setattr(order_module, "_network", counted)
    SampleOrder(num_samples=10**9, seed=1).samples(np.arange(10**6))
    assert 10**6 <= num_walked < 1.001 * 10**6


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="start at 0, not -3"):
        SampleOrder(num_samples=10, seed=1).samples(np.array([1, -3]))


@pytest.mark.parametrize("num_samples", [0, -1, 2**62 + 1])
def test_an_order_of_no_samples_or_too_many_is_refused(num_samples: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        SampleOrder(num_samples=num_samples, seed=1)


def test_no_positions_give_no_samples() -> None:
    assert SampleOrder(num_samples=10, seed=1).samples(np.array([], dtype=np.int64)).tolist() == []


GOLDEN_10 = [5, 4, 8, 9, 6, 0, 2, 3, 1, 7, 2, 0, 4, 1, 7, 6, 8, 3, 9, 5]
"""Two epochs of ten."""


def reference(position: int, *, num_samples: int, seed: int) -> int:
    """The same network, written with Python's whole numbers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        return value ^ (value >> 31)

    epoch, value = divmod(position, num_samples)
    key = mix(mix(seed) + (epoch + 1) * golden & mask)
    high = math.isqrt(num_samples - 1) + 1
    low = -(-num_samples // high)
    while True:
        left, right = divmod(value, low)
        for number in range(8):
            round_key = key + (number + 1) * golden & mask
            if number % 2 == 0:
                left = (left + mix(right ^ round_key) % high) % high
            else:
                right = (right + mix(left ^ round_key) % low) % low
        value = left * low + right
        if value < num_samples:
            return value
