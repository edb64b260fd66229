"""The learning rate, beside torch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from forge.config.training import ScheduleSpec
from forge.train.lr_schedule import learning_rate


def rates(schedule: ScheduleSpec, *, total: int) -> list[float]:
    return [learning_rate(schedule, step=step, total_steps=total, peak=2.0) for step in range(1, total + 1)]


def torch_rates(make: object, count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(count):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


def test_cosine_is_torchs_cosine() -> None:
    ours = rates(ScheduleSpec(kind="cosine", final_fraction=0.1), total=40)
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.2), 40)
    assert ours == pytest.approx(theirs)


def test_linear_is_torchs_linear() -> None:
    ours = rates(ScheduleSpec(kind="linear", final_fraction=0.25), total=40)
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=40), 40
    )
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak_and_no_further(kind: str) -> None:
    found = rates(ScheduleSpec(kind=kind, warmup_steps=10), total=30)
    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(found) == 2.0


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_last_step_has_the_final_fraction(kind: str) -> None:
    assert rates(ScheduleSpec(kind=kind, warmup_steps=3, final_fraction=0.1), total=20)[-1] == pytest.approx(0.2)


def test_a_warm_up_as_long_as_the_training_ends_at_the_peak() -> None:
    assert rates(ScheduleSpec(warmup_steps=5), total=5)[-1] == 2.0
