"""The choices of the plan: made from job, model and device, each with its reason, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forge.errors import PlanError
from forge.plan.inputs import HardwareInfo
from forge.plan.plan import DraftPlan, make_draft, make_plan
from forge.plan.speed import attention_choice, compile_choice, liger_choice
from forge.report.sequence_text import sequence_facts
from forge.report.speed_text import speed_facts
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
        ({"training__compile": "on", "training__sequence_parallel": "auto"}, "cuda", False, True, "compile: on"),
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
    [
        ({"training__zero": {"stage": 3}}, {}, "ZeRO 3"),
        ({}, {"has_dropout": True}, "dropout"),
        ({"training__sequence_parallel": 2}, {}, "lengths differ in every step.*; use auto or off"),
    ],
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
        (
            True,
            {"checkpointing_problem": "Tiny has no gradient_checkpointing_enable()"},
            "Tiny has no .*; use false",
        ),
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


GPU = HardwareInfo(device="cuda", name="test", memory_bytes=None, peak_flops=None)
BOTH = ("flash_attention_3", "flash_attention_2", "sdpa")


@pytest.mark.parametrize(
    ("changes", "device", "facts", "names", "reason"),
    [
        ({}, "cuda", {}, BOTH, "runs on every rank"),
        ({}, "cpu", {}, ("eager",), "up to 512 tokens"),
        ({"data__seq_len": 1024}, "cpu", {}, ("sdpa",), "needs a GPU"),
        ({"training__precision": "fp32"}, "cuda", {}, ("sdpa",), "training.precision is fp32"),
        ({}, "cuda", {"flash_problem": "Tiny does not support it"}, ("sdpa",), "Tiny does not"),
        ({}, "cuda", {"attention_width": 1024, "num_attention_heads": 2}, ("sdpa",), "and these are of 512"),
        ({}, "cuda", {"has_dropout": True}, ("eager",), "dropout"),
        ({}, "cuda", {"sdpa_problem": "Tiny has no sdpa"}, ("eager",), "Tiny has no sdpa"),
        ({}, "cuda", {"attention": "flex_attention"}, ("flex_attention",), "model.attn_implementation"),
        ({"training__attention": "eager"}, "cuda", {}, ("eager",), "training.attention: eager"),
    ],
)
def test_attention_choice__job_model_and_device__candidates_with_reason(
    changes: dict[str, Any], device: str, facts: dict[str, Any], names: tuple[str, ...], reason: str
) -> None:
    facts = {"num_attention_heads": 2} | facts
    choice = attention_choice(tiny_job(**changes), model=tiny_facts(**facts), device=device)
    assert choice.names == names
    assert reason in choice.reason


@pytest.mark.parametrize("facts", [{}, {"has_dropout": True}, {"attention": "sdpa"}])
def test_attention_choice__ranks_share_sequences__sdpa(facts: dict[str, Any]) -> None:
    choice = attention_choice(tiny_job(), model=tiny_facts(**facts), device="cuda", sequence_parallel_size=2)
    assert (choice.names, choice.reason) == (("sdpa",), "ranks share each sequence")


@pytest.mark.parametrize("name", ["eager", "flash_attention_3"])
@pytest.mark.parametrize("key", ["training.attention", "model.attn_implementation"])
def test_make_plan__attention_that_shared_sequences_do_not_use__refused_with_its_key(name: str, key: str) -> None:
    is_of_model = key.startswith("model")
    job = tiny_job(training__sequence_parallel=2, training__attention="auto" if is_of_model else name)
    facts = tiny_facts(num_attention_heads=2, num_key_value_heads=2, attention=name if is_of_model else None)
    problem = f"{key} is {name}, and ranks that share each sequence use sdpa"
    with pytest.raises(PlanError, match=problem) as caught:
        make_plan(job, model=facts, corpus=UNPREPARED, hardware=GPU)
    assert caught.value.job_key == key


def long_draft(**changes: Any) -> DraftPlan:
    """A job whose sequences fit only where ranks share them, on one or on four workers."""
    job = tiny_job(**{"resources__workers": "1..4", "data__seq_len": 2**17} | changes)
    facts = tiny_facts(
        num_attention_heads=4, num_key_value_heads=4, hidden_size=1024, intermediate_size=4096, num_layers=8,
        max_seq_len=None,
    )  # fmt: skip
    return make_draft(job, model=facts, hardware=replace(GPU, memory_bytes=20 * 2**30))


def test_speed_facts__ranks_share_sequences_at_some_sizes__both_choices() -> None:
    plan = long_draft(training__compile="on")
    assert {world.batch.sequence_parallel_size for world in plan.worlds} > {1}
    facts = dict(speed_facts(plan))
    assert facts["attention"].startswith("flash_attention_3 or")
    assert facts["attention"].endswith("; sdpa (ranks share each sequence)")
    assert facts["compile"].startswith("each layer (training.compile: on); nothing (ranks that share")
    assert dict(speed_facts(long_draft(resources__workers="4")))["attention"] == "sdpa (ranks share each sequence)"


@pytest.mark.parametrize("name", ["eager", "flash_attention_2"])
def test_make_draft__named_attention_and_auto__no_rank_shares_a_sequence_and_the_plan_says_why(name: str) -> None:
    plan = long_draft(training__attention=name)
    assert {world.batch.sequence_parallel_size for world in plan.worlds} == {1}
    assert plan.worlds[-1].fits is False
    problem = f"training.attention is {name}, and ranks that share each sequence use sdpa"
    assert dict(sequence_facts(plan))["sequences"] == f"ranks cannot share any: {problem}"
    assert dict(speed_facts(plan))["attention"] == f"{name} (training.attention: {name})"


@pytest.mark.parametrize(
    ("changes", "device", "facts", "reason"),
    [
        ({}, "cpu", {}, "FlashAttention needs a GPU"),
        ({"training__precision": "fp32"}, "cuda", {}, "training.precision is fp32"),
        ({}, "cuda", {"flash_problem": "Tiny does not support it"}, "Tiny does not"),
        ({"training__sequence_parallel": 2}, "cuda", {}, "share each sequence use sdpa .*: 2.; use sdpa, or seq"),
        ({}, "cuda", {"has_dropout": True}, "dropout is drawn for each sample, so it uses eager"),
        ({}, "cuda", {"attention": "sdpa"}, "the job gives model.attn_implementation, so it uses sdpa"),
    ],
)
def test_make_plan__flash_attention_that_cannot_be__refused_by_name(
    changes: dict[str, Any], device: Any, facts: dict[str, Any], reason: str
) -> None:
    job = tiny_job(training__attention="flash_attention_2", **changes)
    facts = {"num_attention_heads": 2, "num_key_value_heads": 2} | facts
    hardware = HardwareInfo(device=device, name="test", memory_bytes=None, peak_flops=None)
    with pytest.raises(PlanError, match=reason) as caught:
        make_plan(job, model=tiny_facts(**facts), corpus=UNPREPARED, hardware=hardware)
    assert caught.value.job_key == "training.attention"


def test_make_plan__flash_attention_of_the_model_on_a_cpu__refused_with_its_key() -> None:
    with pytest.raises(PlanError, match="needs a GPU") as caught:
        make_plan(tiny_job(), model=tiny_facts(attention="flash_attention_2"), corpus=UNPREPARED, hardware=CPU)
    assert caught.value.job_key == "model.attn_implementation"


@pytest.mark.parametrize(("wanted", "more"), [("eager", True), ("sdpa", False)])
def test_make_plan__attention__memory_counts_its_scores(wanted: str, more: bool) -> None:
    plans = [
        make_plan(
            tiny_job(training__attention=name, training__micro_batch_size=2),
            model=tiny_facts(num_attention_heads=2),
            corpus=UNPREPARED,
            hardware=HardwareInfo(device="cuda", name="test", memory_bytes=None, peak_flops=None),
        )
        for name in ("auto", wanted)
    ]
    auto, found = (plan.worlds[0].memory.activations_bytes for plan in plans)
    assert (found > auto) is more


@pytest.mark.parametrize(
    ("changes", "device", "facts", "is_on", "reason"),
    [
        ({}, "cuda", {}, False, "not measured on a GPU"),
        ({"training__liger": True}, "cuda", {}, True, "training.liger: true"),
        ({"training__liger": False}, "cuda", {}, False, "training.liger: false"),
        ({}, "cpu", {}, False, "need a GPU"),
        ({}, "cuda", {"architecture": "gpt2"}, False, "not for gpt2"),
    ],
)
def test_liger_choice__job_model_and_device__chosen_with_reason(
    changes: dict[str, Any], device: str, facts: dict[str, Any], is_on: bool, reason: str
) -> None:
    choice = liger_choice(tiny_job(**changes), model=tiny_facts(**facts), device=device)
    assert choice.is_on == is_on
    assert reason in choice.reason


def test_make_plan__liger_on_a_cpu__refused_by_name() -> None:
    with pytest.raises(PlanError, match="need a GPU; use auto or false") as caught:
        make_plan(tiny_job(training__liger=True), model=tiny_facts(), corpus=UNPREPARED, hardware=CPU)
    assert caught.value.job_key == "training.liger"
