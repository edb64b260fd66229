"""The learning rate, beside the schedules of torch and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from forge.config.schedule import ScheduleSpec
from forge.plan.schedule import schedule_steps
from forge.train.lr_schedule import learning_rate

PEAK, TOTAL = 2.0, 40


def rates(schedule: dict[str, Any], *, total: int = TOTAL) -> list[float]:
    spec = ScheduleSpec.model_validate(schedule)
    lengths = schedule_steps(spec, total_steps=total, tokens_per_step=100)
    return [learning_rate(spec, step=step, lengths=lengths, peak=PEAK) for step in range(1, total + 1)]


def reference(make: Any, **options: Any) -> list[float]:
    """The rates that a scheduler sets for the steps 1, 2, ... of its own count."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, **options)
    found = []
    for _ in range(TOTAL):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


REFERENCES: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    ({"kind": "cosine"}, CosineAnnealingLR, {"T_max": TOTAL, "eta_min": 0.2}),
    ({"kind": "linear", "final_fraction": 0.25}, LinearLR,
     {"start_factor": 1.0, "end_factor": 0.25, "total_iters": TOTAL}),
    ({"kind": "cosine", "warmup": 7}, transformers.get_cosine_with_min_lr_schedule_with_warmup,
     {"num_warmup_steps": 7, "num_training_steps": TOTAL, "min_lr_rate": 0.1}),
    ({"kind": "linear", "warmup": "10%", "final_fraction": 0}, transformers.get_linear_schedule_with_warmup,
     {"num_warmup_steps": 4, "num_training_steps": TOTAL}),
    ({"kind": "polynomial", "warmup": 5, "power": 2, "final_fraction": 0.05},
     transformers.get_polynomial_decay_schedule_with_warmup,
     {"num_warmup_steps": 5, "num_training_steps": TOTAL, "lr_end": 0.1, "power": 2.0}),
    ({"kind": "polynomial"}, transformers.get_polynomial_decay_schedule_with_warmup,
     {"num_warmup_steps": 0, "num_training_steps": TOTAL, "lr_end": 0.2}),
    ({"kind": "inverse-sqrt", "warmup": "401 tokens"}, transformers.get_inverse_sqrt_schedule,
     {"num_warmup_steps": 5}),
    ({"kind": "inverse-sqrt", "warmup": 5, "timescale": 9}, transformers.get_inverse_sqrt_schedule,
     {"num_warmup_steps": 5, "timescale": 9}),
    ({"kind": "inverse-sqrt"}, transformers.get_inverse_sqrt_schedule, {"num_warmup_steps": 0}),
    ({"kind": "constant", "warmup": 5}, transformers.get_constant_schedule_with_warmup, {"num_warmup_steps": 5}),
    *[
        ({"kind": "wsd", "decay": "25%", "decay_shape": shape, "final_fraction": 0.1, "warmup": 0},
         transformers.get_wsd_schedule,
         {"num_warmup_steps": 0, "num_decay_steps": 10, "num_stable_steps": 30, "min_lr_ratio": 0.1,
          "decay_type": shape})
        for shape in ("1-sqrt", "linear", "cosine")
    ],
    ({"kind": "wsd", "warmup": 6, "final_fraction": 0}, transformers.get_wsd_schedule,
     {"num_warmup_steps": 6, "num_decay_steps": 8, "num_stable_steps": 26, "decay_type": "1-sqrt"}),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "make", "options"), REFERENCES)
def test_learning_rate__any_kind__is_the_references(
    schedule: dict[str, Any], make: Any, options: dict[str, Any]
) -> None:
    assert rates(schedule) == pytest.approx(reference(make, **options), abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "wsd", "inverse-sqrt", "constant"])
def test_learning_rate__warm_up__rises_to_the_peak_and_no_further(kind: str) -> None:
    found = rates({"kind": kind, "warmup": 10})
    assert found[:10] == pytest.approx([PEAK * step / 10 for step in range(1, 11)])
    assert max(found) == PEAK


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "wsd"])
def test_learning_rate__last_step__has_the_final_fraction(kind: str) -> None:
    assert rates({"kind": kind, "warmup": 3, "final_fraction": 0.1}, total=20)[-1] == pytest.approx(0.2)


def test_learning_rate__warm_up_as_long_as_the_training__ends_at_the_peak() -> None:
    assert rates({"warmup": 5}, total=5)[-1] == PEAK
    assert rates({"warmup": "100%"}, total=5)[-1] == PEAK
