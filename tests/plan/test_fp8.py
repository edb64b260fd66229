"""`training.fp8` in the plan: what is computed in it, what it does not promise, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from forge.errors import PlanError
from forge.plan.bill import make_bill
from forge.plan.curve import curve_differences, run_digest
from forge.plan.inputs import Fp8Layers, HardwareInfo
from forge.plan.memory import OptimizerState, estimate_memory
from forge.plan.plan import Plan, make_plan, plan_from_json, plan_to_json
from forge.pricing.offers import OfferTable
from forge.report.speed_text import speed_facts
from forge.report.text import plan_facts
from tests.support.jobs import CPU, UNPREPARED, tiny_facts, tiny_job
from tests.support.offers import offer

LAYERS = Fp8Layers(num_layers=12, num_parameters=20_000, left_out={"of sizes that are no multiples of 16": 2})
UNKNOWN_GPU = HardwareInfo(device="cuda", name="test", memory_bytes=None, peak_flops=None)


def planned(*, hardware: HardwareInfo = UNKNOWN_GPU, layers: Fp8Layers | None = LAYERS, **changes: Any) -> Plan:
    job = tiny_job(**{"training__fp8": True, **changes})
    return make_plan(job, model=tiny_facts(fp8_layers=layers), corpus=UNPREPARED, hardware=hardware)


def test_plan__fp8__says_what_is_in_it_and_promises_no_speed() -> None:
    plan = planned()
    found = dict(speed_facts(plan))["fp8"]
    assert found == (
        "products of 12 linear layers, 69% of the parameters; not of 2 of sizes that are no multiples of 16; "
        "torchao gains with training.compile: on only; not measured on a GPU yet, so the forecast counts bf16 "
        "(training.fp8)"
    )
    assert "compile" not in dict(speed_facts(planned(training__compile="on")))["fp8"]
    assert "fp8" not in dict(speed_facts(planned(training__fp8=False)))
    assert plan_from_json(plan_to_json(plan)) == plan


@pytest.mark.parametrize(
    ("changes", "hardware", "layers", "reason"),
    [
        ({}, CPU, LAYERS, "need a GPU; use false"),
        ({}, "NVIDIA A100-SXM4-80GB", LAYERS, r"capability 8\.9 or above, and A100-80GB has 8\.0"),
        ({}, "T4", LAYERS, r"T4 has 7\.5"),
        ({"training__precision": "fp32"}, "L4", LAYERS, r"results in bf16, and training\.precision is fp32"),
        ({"model": {"from_pretrained": "/base", "lora": {"rank": 16}}}, "L4", LAYERS, r"with model\.lora"),
        (
            {"training__objective": "dpo", "data__format": "preference", "model": {"from_pretrained": "/base"}},
            "L4",
            LAYERS,
            "compares the model with itself as it was, computed in bf16",
        ),
        (
            {},
            "L4",
            Fp8Layers(num_layers=0, num_parameters=0),
            r"no torch\.nn\.Linear in its repeated layers that can",
        ),
        ({}, "L4", None, r"no torch\.nn\.Linear"),
        (
            {},
            "L4",
            Fp8Layers(num_layers=0, num_parameters=0, left_out={"that are frozen": 3}),
            "that can; 3 that are frozen",
        ),
    ],
)
def test_plan__fp8_that_cannot_be__refused_by_name(
    changes: dict[str, Any], hardware: HardwareInfo | str, layers: Fp8Layers | None, reason: str
) -> None:
    if isinstance(hardware, str):
        hardware = HardwareInfo(device="cuda", name=hardware, memory_bytes=None, peak_flops=None)
    with pytest.raises(PlanError, match=reason) as caught:
        planned(hardware=hardware, layers=layers, **changes)
    assert caught.value.job_key == "training.fp8"


@pytest.mark.parametrize("name", ["H100", "NVIDIA L4", "RTX-4090", "B200", "NVIDIA L40S"])
def test_plan__gpu_with_fp8__is_planned(name: str) -> None:
    plan = planned(hardware=HardwareInfo(device="cuda", name=name, memory_bytes=None, peak_flops=None))
    assert "fp8" in dict(plan_facts(plan))


def test_candidates__gpus_without_fp8__are_left_out_with_the_reason() -> None:
    plan = planned(resources__gpu="auto", training__total_steps=10**7)
    found = make_bill(plan, OfferTable(offers=(offer(), offer(instance="g6.xlarge", gpu="L4"))))
    assert [(one.reason, one.num_offers) for one in found.left_out] == [
        ("the GPU does not compute in fp8 (training.fp8)", 1)
    ]
    assert {one.offer.instance for one in found.candidates} == {"g6.xlarge"}


def test_run__resumed_with_another_fp8__has_another_loss_curve() -> None:
    before, now = (tiny_job(training__fp8=flag) for flag in (False, True))
    assert [difference.key for difference in curve_differences(before, now)] == ["training.fp8"]
    assert run_digest(planned(training__fp8=False)) != run_digest(planned())


def test_memory__casts_of_one_product__are_counted_at_its_peak() -> None:
    state = OptimizerState(sharded_bytes=8, replicated_bytes=0)
    sizes: dict[str, Any] = {"world_size": 2, "is_on_host": False, "state": state, "micro_batch_size": 8}
    found = [
        estimate_memory(tiny_facts(), tiny_job(training__fp8=flag).training, seq_len=16, **sizes).total_bytes
        for flag in (True, False)
    ]
    assert (
        found[0] - found[1] == 9 * (8 * 16 * 64) + 32 * 64
    )  # input in two copies of fp32 and in fp8; weight in fp8
