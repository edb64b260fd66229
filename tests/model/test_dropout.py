"""Masks of dropout that do not depend on the padding that a sample gets from its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from forge.model.dropout import SampleDropout, padding_free_mask

CPU = torch.device("cpu")
SEEDS = np.random.default_rng(1).integers(2**62, size=8).tolist()
"""As of digests."""


def test_padding_free_mask__more_padding__changes_no_element() -> None:
    long, short = (
        padding_free_mask((3, 4, size, size + 2), seeds=(5, 6, 7), p=0.3, device=CPU) for size in (20, 9)
    )
    assert bool((long[:, :, :9, :11] == short).all())


def test_padding_free_mask__elements_samples_and_shares__are_as_if_drawn() -> None:
    mask = padding_free_mask((8, 4, 50, 50), seeds=SEEDS, p=0.3, device=CPU).double()
    assert mask.mean().item() == pytest.approx(0.7, abs=0.005)
    flat = mask.view(8, -1)
    assert (torch.corrcoef(flat) - torch.eye(8)).abs().max() < 0.05  # samples
    for axis in (1, 2, 3):
        here, there = mask.narrow(axis, 0, mask.shape[axis] - 1), mask.narrow(axis, 1, mask.shape[axis] - 1)
        neighbours = torch.corrcoef(torch.stack([here.flatten(), there.flatten()]))
        assert neighbours[0, 1].abs() < 0.02


@pytest.mark.parametrize("shape", [(2, 7, 8), (2, 3, 7, 7), (6, 7, 7)])
def test_dropout__examples_with_other_padding__have_the_same_masks(shape: tuple[int, ...]) -> None:
    dropout = SampleDropout(nn.Identity(), seed=1)
    rows = np.array([0, 0])
    kept = []
    for extra in (0, 5):
        longer = [size + extra if size == 7 else size for size in shape]
        dropout.begin(step=1, positions=np.array([3]), sequence_rows=rows)
        out = dropout.dropout(torch.ones(longer), 0.4)
        kept.append(out[tuple(slice(size) for size in shape)])
    assert bool((kept[0] == kept[1]).all())
    assert kept[0].unique().tolist() == pytest.approx([0, 1 / 0.6])
