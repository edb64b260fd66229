"""The free space of a disk against what a run writes there."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from forge.errors import PlanError
from forge.plan.space import RECORDS_BYTES, checkpoint_bytes, space_warning
from tests.support.jobs import tiny_plan


def space(free_mib: float, *, every: str = "10m", must_fit: bool = True, **changes: Any) -> str | None:
    """The warning for a model of 1 MiB parameters, so 12 MiB a checkpoint."""
    plan = tiny_plan(checkpoint={"every": every, "keep": 3}, **changes)
    facts = replace(plan.model, num_parameters=2**20, num_trainable_parameters=2**20, num_base_parameters=0)
    return space_warning(
        replace(plan, model=facts),
        folder="runs",
        free_bytes=int(free_mib * 2**20) + RECORDS_BYTES,
        must_fit=must_fit,
    )


def test_space_warning__everything_fits__is_none() -> None:
    assert space(48) is None  # `keep`, and the one being written
    assert space(24, every="6 steps", training__total_steps=12) is None  # only two are written
    assert space(12, every="100 steps", training__total_steps=12) is None


@pytest.mark.parametrize(("free", "consequence"), [(47.9, "older ones are removed before"), (7.9, "only one fits")])
def test_space_warning__some_fit__says_the_numbers_and_what_happens(free: float, consequence: str) -> None:
    found = space(free)
    assert found is not None
    assert re.match(
        r"the disk of runs has [\d.]+ MiB free, and the run takes up to 64.0 MiB: 4 checkpoints of 12.0", found
    )
    assert consequence in found
    assert "lower checkpoint.keep, or set checkpoint.to" in found


def test_space_warning__not_even_one_fits__is_refused() -> None:
    with pytest.raises(PlanError, match="Not even one checkpoint fits, so no weights could be kept; free"):
        space(11.9 - RECORDS_BYTES / 2**20)
    warning = space(11.9 - RECORDS_BYTES / 2**20, must_fit=False)  # a plan of a run that trains elsewhere
    assert warning is not None and "Not even one checkpoint fits" in warning


def test_checkpoint_bytes__averaged_and_frozen_weights__are_counted() -> None:
    plan = tiny_plan(training__ema={"decay": 0.9})
    facts = replace(plan.model, num_parameters=300, num_trainable_parameters=100, num_base_parameters=50)
    assert checkpoint_bytes(facts, plan.job.training) == 16 * 100 + 2 * 150
