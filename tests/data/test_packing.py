from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.data.packing import WINDOW, pack_rows

LENGTHS = st.lists(st.integers(1, 32), max_size=200)


@given(lengths=LENGTHS, seed=st.integers(0, 2**63 - 1))
def test_pack_rows__any_lengths__every_example_once_and_no_row_too_long(lengths: list[int], seed: int) -> None:
    rows = pack_rows(np.array(lengths, dtype=np.int64), seq_len=32, seed=seed)
    assert sorted(i for row in rows for i in row.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 32 for row in rows)


@given(lengths=LENGTHS.filter(bool), seed=st.integers(0, 2**63 - 1))
def test_pack_rows__any_lengths__within_the_bound_of_first_fit_decreasing(lengths: list[int], seed: int) -> None:
    # Dósa 2007: FFD needs at most 11/9 · OPT + 6/9 bins, and OPT is at least the total length over the row's.
    rows = pack_rows(np.array(lengths, dtype=np.int64), seq_len=32, seed=seed)
    too_long_to_share = sum(length > 16 for length in lengths)
    # Two rows that are each at most half full would have been one.
    half_full = sum(sum(lengths[i] for i in row) <= 16 for row in rows)
    assert half_full <= 1
    assert len(rows) <= 11 / 9 * 2 * max(too_long_to_share, math.ceil(sum(lengths) / 32)) + 1


def test_pack_rows__same_seed__same_rows_and_another_seed_other_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 33, size=500)
    rows = [[row.tolist() for row in pack_rows(lengths, seq_len=32, seed=seed)] for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_pack_rows__several_windows__little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 1025, size=3 * WINDOW)
    rows = pack_rows(lengths, seq_len=1024, seed=1)
    assert lengths.sum() / (len(rows) * 1024) > 0.98


@pytest.mark.parametrize("lengths", [[], [5]])
def test_pack_rows__none_or_one_example__as_many_rows(lengths: list[int]) -> None:
    rows = pack_rows(np.array(lengths, dtype=np.int64), seq_len=8, seed=1)
    assert [row.tolist() for row in rows] == [[i] for i in range(len(lengths))]
