"""What the plan says about the optimizer."""

from __future__ import annotations

from typing import Any

from forge.plan.inputs import TrainedParameter
from forge.plan.plan import make_plan
from forge.report.optimizer_text import optimizer_facts
from tests.support.jobs import CPU, UNPREPARED, tiny_facts, tiny_job

SHAPES = {"embed.weight": (100, 32), **{f"layers.{i}.weight": (32, 32) for i in range(12)}, "norm.weight": (32,)}
TRAINED = tuple(TrainedParameter(name=name, shape=shape) for name, shape in SHAPES.items())


def rows(**optimizer: Any) -> list[str]:
    job = tiny_job(training__optimizer=optimizer)
    plan = make_plan(job, model=tiny_facts(trained=TRAINED), corpus=UNPREPARED, hardware=CPU)
    return [text for _, text in optimizer_facts(plan)]


def test_optimizer_facts__groups__have_counts_rates_and_state() -> None:
    assert rows(lr=1e-3, groups={"embed": {"lr": 1e-4, "weight_decay": 0}}) == [
        "adamw: 3.20k parameters in 1 matrix, lr 0.0001, weight decay 0",
        "adamw: 12.3k parameters in 12 matrices, lr 0.001, weight decay 0.1",
        "adamw: 32 parameters in 1 vector, lr 0.001, weight decay 0",
        "state of 121 KiB beside the weights",
    ]


def test_optimizer_facts__many_groups__are_summed_up() -> None:
    found = rows(lr=1e-3, layer_decay=0.5)
    assert found[-2:] == [
        "and 5 more groups with 4.13k parameters, lr 6.25e-05 to 0.001",
        "state of 121 KiB beside the weights",
    ]


def test_optimizer_facts__adafactor__says_what_is_on_every_worker() -> None:
    assert rows(name="adafactor")[-1].startswith("state of 3.6")
    assert rows(name="adafactor")[-1].endswith("KiB on every worker")
