"""Steps divided into two lanes: nothing is lost, the order stays, and both take about as long."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from forge.inference.lanes import divide
from forge.inference.packed_rows import PromptPiece
from forge.inference.schedule import PlannedStep

PAD = 4


def step_of(num_decoding: int, lengths: list[int], **changes: Any) -> PlannedStep:
    """A step; sequences are named by their rows."""
    decoding: list[Any] = [SimpleNamespace(row=row) for row in range(num_decoding)]
    prompts: list[tuple[Any, PromptPiece]] = []
    offset = num_decoding
    for row, length in enumerate(lengths, start=num_decoding):
        prompts.append((SimpleNamespace(row=row), PromptPiece(row=row, start=64, stop=64 + length, offset=offset)))
        offset += length
    return PlannedStep(decoding=tuple(decoding), prompts=tuple(prompts), **changes)


@pytest.mark.parametrize("seed", range(50))
def test_divide__any_step__has_everything_once_in_its_order(seed: int) -> None:
    draw = random.Random(seed)
    num = draw.randint(0, 40)
    lengths = [draw.randint(1, 300) for _ in range(draw.randint(0 if num else 1, 6))]
    step = step_of(num, lengths)
    lanes = divide(step, pad=PAD)
    assert 1 <= len(lanes) <= 2
    assert sum((lane.step.decoding for lane in lanes), ()) == step.decoding
    assert [one for lane in lanes for one, _ in lane.step.prompts] == [one for one, _ in step.prompts]
    for lane in lanes:
        assert [one.row for one in lane.step.decoding] == list(
            range(lane.first, lane.first + len(lane.step.decoding))
        )
        offset = len(lane.step.decoding)
        for sequence, piece in lane.step.prompts:
            assert (piece.row, piece.offset, piece.start) == (sequence.row, offset, 64)
            offset += piece.stop - piece.start
        assert offset > 0
    if not lengths and len(lanes) == 2:
        assert len(lanes[0].step.decoding) % PAD == 0  # the second one alone is padded


@pytest.mark.parametrize(
    ("num_decoding", "lengths", "first", "second"),
    [
        (4, [], (4, 0), None),  # as few as one product takes
        (5, [], (4, 0), (1, 0)),
        (32, [], (16, 0), (16, 0)),
        (1, [200], (1, 0), (0, 1)),
        (0, [200], (0, 1), None),
        (0, [200, 100, 90], (0, 1), (0, 2)),
        (32, [200, 10, 10], (32, 0), (0, 3)),
        (2, [100, 100, 100], (2, 1), (0, 2)),
    ],
)
def test_divide__known_steps__are_balanced(
    num_decoding: int, lengths: list[int], first: tuple[int, int], second: tuple[int, int] | None
) -> None:
    lanes = divide(step_of(num_decoding, lengths), pad=PAD)
    found = [(len(lane.step.decoding), len(lane.step.prompts)) for lane in lanes]
    assert found == [first, *([second] if second else [])]


def test_divide__guesses__stay_with_their_text() -> None:
    step = step_of(1, [], draft=(5, 6))
    assert [lane.step for lane in divide(step, pad=PAD)] == [step]
