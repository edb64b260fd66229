"""Stragglers in synthetic timings: steady, noisy, one slow, all slow, several kinds of device."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest

from forge.elastic.straggler_detector import (
    MIN_RATIO,
    MIN_ROUND_S,
    NUM_ROUNDS,
    WINDOW_STEPS,
    Straggler,
    StragglerDetector,
)

NODES = tuple(f"n{rank // 2}" for rank in range(8))
"""Four nodes of two ranks."""


def rounds(
    own_s: Callable[[int, int], float],
    *,
    assignment: tuple[str, ...] = NODES,
    devices: Mapping[str, str] | None = None,
    count: int = NUM_ROUNDS,
    detector: StragglerDetector | None = None,
) -> list[list[Straggler]]:
    """Return what each round finds.

    Args:
        own_s: the time of a rank in a round.
    """
    detector = detector or StragglerDetector()
    found = []
    for number in range(count):
        for rank in range(len(assignment)):
            detector.update(rank, own_s=own_s(rank, number), num_steps=WINDOW_STEPS * (number + 1))
        found.append(detector.find(assignment, devices=devices or {}, now=1000.0 + MIN_ROUND_S * number))
    return found


def slow_rank(rank: int, number: int, *, slow: int = 5, ratio: float = 2.0) -> float:
    return 0.1 * (ratio if rank == slow else 1.0)


def test_find__one_slow_rank__its_node_is_named_in_the_last_round() -> None:
    *before, last = rounds(slow_rank)
    assert not any(before)
    assert [(straggler.node, straggler.rank) for straggler in last] == [("n2", 5)]
    assert (last[0].ratio, last[0].own_s, last[0].usual_s) == pytest.approx((2.0, 0.2, 0.1))


@pytest.mark.parametrize("seed", range(5))
def test_find__noise_of_a_third__nothing(seed: int) -> None:
    chance = random.Random(seed)
    assert not any(rounds(lambda rank, number: 0.1 * chance.uniform(0.85, 1.2), count=50))


def test_find__noise_and_one_slow_node__only_that_node() -> None:
    chance = random.Random(0)
    found = rounds(lambda rank, number: slow_rank(rank, number) * chance.uniform(0.9, 1.1), count=20)
    assert {straggler.node for stragglers in found for straggler in stragglers} == {"n2"}


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_find__all_equally_slow__nothing(factor: float) -> None:
    assert not any(rounds(lambda rank, number: 0.1 * factor, count=10))


def test_find__all_slower_in_every_round__nothing() -> None:
    assert not any(rounds(lambda rank, number: 0.1 * 2**number, count=10))


def test_find__below_the_ratio__nothing() -> None:
    assert not any(rounds(lambda rank, number: slow_rank(rank, number, ratio=MIN_RATIO - 0.01), count=10))


def test_find__slow_in_every_other_round__nothing() -> None:
    found = rounds(lambda rank, number: slow_rank(rank, number) if number % 2 else 0.1, count=20)
    assert not any(found)


def test_find__slower_kind_of_gpu__nothing_unless_slow_among_its_kind() -> None:
    devices = {"n0": "H100", "n1": "H100", "n2": "A100", "n3": "A100"}
    kinds = {"H100": 0.1, "A100": 0.25}
    assert not any(rounds(lambda rank, number: kinds[devices[NODES[rank]]], devices=devices, count=10))
    last = rounds(lambda rank, number: kinds[devices[NODES[rank]]] * (1 + (rank == 7)), devices=devices)[-1]
    assert [(straggler.node, straggler.usual_s) for straggler in last] == [("n3", 0.25)]


def test_find__two_nodes__the_slower_one() -> None:
    last = rounds(lambda rank, number: 0.1 * (1 + rank // 2), assignment=("a", "a", "b", "b"))[-1]
    assert [(straggler.node, straggler.ratio) for straggler in last] == [("b", pytest.approx(2.0))]
    assert [s.node for s in rounds(lambda rank, number: 0.1 * (1 + rank), assignment=("a", "b"))[-1]] == ["b"]


def test_find__one_rank__nothing() -> None:
    assert not any(rounds(lambda rank, number: 0.1 * (1 + number), assignment=("a",), count=5))


def test_find__same_steps_or_missing_rank__no_new_round() -> None:
    detector = StragglerDetector()
    for now in range(5):
        for rank in range(7):  # rank 7 has timed nothing
            detector.update(rank, own_s=slow_rank(rank, 0), num_steps=WINDOW_STEPS * (now + 1))
        assert not detector.find(NODES, devices={}, now=1000.0 + MIN_ROUND_S * now)
    for now in range(5, 20):
        detector.update(7, own_s=0.1, num_steps=WINDOW_STEPS)  # the same window again and again
        assert not detector.find(NODES, devices={}, now=1000.0 + MIN_ROUND_S * now)


def test_find__rounds_in_less_than_their_least_time__wait() -> None:
    detector = StragglerDetector()
    found = []
    for number in range(2 * NUM_ROUNDS):
        for rank in range(8):
            detector.update(rank, own_s=slow_rank(rank, 0), num_steps=WINDOW_STEPS * (number + 1))
        found += detector.find(NODES, devices={}, now=1000.0 + MIN_ROUND_S / 4 * number)
    assert not found


def test_begin_generation__rounds_before_still_count() -> None:
    detector = StragglerDetector()
    assert not any(rounds(slow_rank, detector=detector, count=NUM_ROUNDS - 1))
    detector.begin_generation()
    assignment = tuple(reversed(NODES))  # rank 2 is on n2 now
    for rank in range(8):
        detector.update(rank, own_s=slow_rank(rank, 0, slow=2), num_steps=WINDOW_STEPS)
    found = detector.find(assignment, devices={}, now=1000.0 + 10 * MIN_ROUND_S)
    assert [(straggler.node, straggler.rank) for straggler in found] == [("n2", 2)]
