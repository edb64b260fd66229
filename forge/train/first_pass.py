"""The first pass over a step, for objectives whose loss is of all its rows together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from forge.data.loader import MicroBatch
from forge.objective.base import Objective, TwoPassObjective

Prepared = tuple[MicroBatch, Mapping[str, Tensor]]
"""A micro-batch, and what an objective makes of it."""


def with_first_pass(
    objective: Objective, batches: Iterable[Prepared], *, run: Callable[[Prepared], Mapping[str, Tensor]]
) -> Iterable[Prepared]:
    """Add to micro-batches what a first pass over all of them gives, if the objective needs one; collective.

    Args:
        run: the first pass of one micro-batch.
    """
    if not isinstance(objective, TwoPassObjective):
        return batches
    batches = list(batches)
    if len(batches) == 1:
        return batches
    with torch.no_grad():
        further = objective.second_inputs([run(batch) for batch in batches])
    return [(batch, {**own, **more}) for (batch, own), more in zip(batches, further, strict=True)]
