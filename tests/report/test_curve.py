"""The loss curve in characters."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from forge.report.curve import loss_curve

ANY_LOSS = st.one_of(st.floats(), st.floats(min_value=0, max_value=20))
FINITE = st.floats(min_value=-1e9, max_value=1e9)
BLOCKS = " ▁▂▃▄▅▆▇█"


def heights(picture: list[str]) -> list[int]:
    """Eighths of a row, for each column."""
    rows = [row[9:] for row in picture]
    return [sum(BLOCKS.index(character) for character in column) for column in zip(*rows, strict=True)]


@given(st.lists(ANY_LOSS), st.integers(1, 200), st.integers(1, 12))
def test_loss_curve__any_losses__fits_its_frame(losses: list[float], width: int, rows: int) -> None:
    picture = loss_curve(losses, width=width, rows=rows)
    assert len(picture) in (0, rows)
    assert all(len(row) <= max(width, 10) for row in picture)
    assert bool(picture) == any(abs(loss) < 1e99 for loss in losses)


@given(st.lists(FINITE, min_size=1, max_size=60), st.lists(st.sampled_from([math.nan, math.inf, -math.inf])))
def test_loss_curve__not_finite__is_ignored(losses: list[float], others: list[float]) -> None:
    assert loss_curve(others + losses, width=40) == loss_curve(losses, width=40)


@given(st.lists(FINITE, min_size=1, max_size=60))
def test_loss_curve__larger_loss__not_lower(losses: list[float]) -> None:
    drawn = heights(loss_curve(losses, width=9 + len(losses)))
    assert len(drawn) == len(losses)
    assert [drawn[i] for i in sorted(range(len(losses)), key=losses.__getitem__)] == sorted(drawn)


@given(FINITE, st.integers(1, 50))
def test_loss_curve__constant__flat_line(loss: float, count: int) -> None:
    assert heights(loss_curve([loss] * count, width=100)) == [1] * count


def test_loss_curve__labels__largest_and_smallest() -> None:
    picture = loss_curve([5.25, 3.0, 1.5], width=40)
    assert picture[0].split()[0] == "5.250"
    assert picture[-1].split()[0] == "1.500"
