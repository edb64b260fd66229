"""`training.activation_offload` in the plan: what moves, where it does nothing, and when it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from forge.errors import PlanError
from forge.plan.curve import curve_differences, free_differences
from forge.plan.forecast import forecast, is_same_step
from forge.plan.inputs import HardwareInfo
from forge.plan.memory import OptimizerState, activation_bytes, estimate_memory
from forge.plan.plan import make_plan
from forge.plan.speed import require_checkpointing
from forge.report.speed_text import speed_facts
from tests.support.jobs import UNPREPARED, tiny_facts, tiny_job, tiny_plan

FACTS = tiny_facts(num_layers=10)
TOKENS, SEQ_LEN = 64, 16
RECOMPUTED: dict[str, Any] = {"training__activation_checkpointing": True, "training__precision": "bf16"}


def test_activation_bytes__inputs_of_layers__are_in_host_memory_but_for_two() -> None:
    sizes = {"micro_batch_size": TOKENS // SEQ_LEN, "seq_len": SEQ_LEN}
    kept, moved = (tiny_job(**RECOMPUTED, training__activation_offload=flag).training for flag in (False, True))
    before, after = (activation_bytes(FACTS, training, is_on_host=False, **sizes) for training in (kept, moved))
    expected = TOKENS * 8 * 32 * 2  # tokens x layers x hidden size x bytes
    assert before - after == expected
    assert activation_bytes(FACTS, moved, is_on_host=True, **sizes) == activation_bytes(
        FACTS, kept, is_on_host=True, **sizes
    )
    state = OptimizerState(sharded_bytes=8, replicated_bytes=0)
    found = [
        estimate_memory(FACTS, training, world_size=2, is_on_host=False, state=state, **sizes)
        for training in (kept, moved)
    ]
    assert found[0].total_bytes - found[1].total_bytes == expected
    assert found[1].host_bytes - found[0].host_bytes == expected


def test_forecast__activation_offload_on_gpus__takes_longer_and_names_the_rate() -> None:
    gpu = HardwareInfo(device="cuda", name="A100-80GB", memory_bytes=None, peak_flops=312e12)
    kept, moved = (
        make_plan(
            tiny_job(**RECOMPUTED, training__activation_offload=flag, training__micro_batch_size=2),
            model=FACTS,
            corpus=UNPREPARED,
            hardware=gpu,
        )
        for flag in (False, True)
    )
    before, after = (forecast(plan) for plan in (kept, moved))
    note = "with copies of training.activation_offload at 26 GB/s (assumed), beside which nothing runs"
    assert note in after.notes
    assert not [note for note in before.notes if "offload" in note]
    copied = 2 * 12 * SEQ_LEN * 10 * 32 * 2  # both copies of a batch of 12 sequences: layers x hidden size x bytes
    for one, other in zip(after.worlds, before.worlds, strict=True):
        rows = moved.for_world_size(one.world_size).batch
        share = rows.micro_batch_size * rows.gradient_accumulation_steps / 12
        assert one.step_s - other.step_s == pytest.approx(share * copied / (0.8 * 32e9))


def test_same_step__run_with_another_option_of_speed__is_another_step() -> None:
    plans = [tiny_plan(**RECOMPUTED), tiny_plan(**RECOMPUTED, training__activation_offload=True)]
    plans += [tiny_plan(**RECOMPUTED, training__compile="on"), tiny_plan(**RECOMPUTED, training__attention="sdpa")]
    assert [is_same_step(plans[0], other) for other in plans] == [True, False, False, False]


def test_activation_offload__in_a_resumed_run__may_change() -> None:
    before = tiny_job(**RECOMPUTED)
    now = tiny_job(**RECOMPUTED, training__activation_offload=True)
    assert curve_differences(before, now) == []
    assert [difference.key for difference in free_differences(before, now)] == ["training.activation_offload"]


def test_activation_offload__on_a_cpu__is_said_to_do_nothing() -> None:
    plan = tiny_plan(**RECOMPUTED, training__activation_offload=True)
    assert (
        "layer inputs",
        "not moved: on a CPU they are in host memory (training.activation_offload)",
    ) in speed_facts(plan)


def test_activation_offload__class_of_the_user__is_refused() -> None:
    job = tiny_job(**RECOMPUTED, training__activation_offload=True)
    require_checkpointing(job, FACTS)
    own = job.model_copy(update={"model": job.model.model_copy(update={"class": "my_models:Tiny"})})
    with pytest.raises(PlanError, match="is for models of transformers"):
        require_checkpointing(own, FACTS)
