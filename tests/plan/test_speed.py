"""The choices of the plan: made from job, model and device, each with its reason, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from forge.errors import PlanError
from forge.plan.plan import make_plan
from forge.plan.speed import compile_choice
from tests.support.jobs import CPU, UNPREPARED, tiny_facts, tiny_job


@pytest.mark.parametrize(
    ("changes", "device", "has_dropout", "is_on", "reason"),
    [
        ({}, "cuda", False, False, "not measured on a GPU"),
        ({}, "cpu", False, False, "on a CPU"),
        ({"training__compile": "on"}, "cpu", False, True, "training.compile: on"),
        ({"training__compile": "off"}, "cuda", False, False, "training.compile: off"),
        ({"training__zero": {"stage": 3}}, "cuda", False, False, "ZeRO 3"),
        ({}, "cuda", True, False, "dropout"),
    ],
)
def test_compile_choice__job_and_device__chosen_with_reason(
    changes: dict[str, Any], device: str, has_dropout: bool, is_on: bool, reason: str
) -> None:
    choice = compile_choice(tiny_job(**changes), model=tiny_facts(has_dropout=has_dropout), device=device)
    assert choice.is_on == is_on
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("changes", "facts", "reason"),
    [({"training__zero": {"stage": 3}}, {}, "ZeRO 3"), ({}, {"has_dropout": True}, "dropout")],
)
def test_make_plan__compile_on_that_cannot_be__refused_by_name(
    changes: dict[str, Any], facts: dict[str, Any], reason: str
) -> None:
    job = tiny_job(training__compile="on", **changes)
    with pytest.raises(PlanError, match=reason) as caught:
        make_plan(job, model=tiny_facts(**facts), corpus=UNPREPARED, hardware=CPU)
    assert caught.value.job_key == "training.compile"


@pytest.mark.parametrize(
    ("kind", "facts", "reason"),
    [
        (True, {"checkpointing_problem": "Tiny has no gradient_checkpointing_enable()"}, "Tiny has no .*; use false"),
        ("selective", {"selective_problem": "Tiny changes a result"}, "Tiny changes a result; use true"),
    ],
)
def test_make_plan__activation_checkpointing_that_cannot_be__refused_by_name(
    kind: bool | str, facts: dict[str, Any], reason: str
) -> None:
    job = tiny_job(training__activation_checkpointing=kind)
    with pytest.raises(PlanError, match=reason) as caught:
        make_plan(job, model=tiny_facts(**facts), corpus=UNPREPARED, hardware=CPU)
    assert caught.value.job_key == "training.activation_checkpointing"
