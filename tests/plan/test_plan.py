"""The plan as a whole: pure, complete, and an error for jobs that cannot be run."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from forge.errors import PlanError
from forge.plan.curve import config_digest
from forge.plan.inputs import CorpusInfo, HardwareInfo
from forge.plan.memory import (
    HOST_ACTIVATIONS,
    LIBRARIES_BYTES,
    USABLE_SHARE,
    MemoryEstimate,
    estimate_memory,
)
from forge.plan.parameter_groups import OptimizerState
from forge.plan.plan import (
    DraftPlan,
    Plan,
    make_draft,
    make_plan,
    plan_from_json,
    plan_to_json,
)
from forge.plan.world_size import MAX_LISTED, listed_sizes
from forge.units import Range
from tests.support.jobs import CPU, tiny_facts, tiny_job

CORPUS = CorpusInfo(
    folder="/data", digest="d", vocab_size=128, eot_id=0, seq_len=16, num_documents=3, num_text_bytes=1000,
    num_train_tokens=1601, num_held_out_tokens=161, num_train_sequences=100, num_held_out_sequences=10,
    unigram_perplexity=math.nan,
)  # fmt: skip


def plan(corpus: CorpusInfo = CORPUS, hardware: HardwareInfo = CPU, **changes: object) -> Plan:
    return make_plan(tiny_job(**changes), model=tiny_facts(), corpus=corpus, hardware=hardware)


def test_make_plan__equal_input__gives_equal_bytes() -> None:
    assert plan_to_json(plan()) == plan_to_json(plan())


def test_plan_from_json__round_trip__keeps_every_byte() -> None:
    text = plan_to_json(plan(training__ema={"decay": 0.9}, data__files=["a", "b"], data__source=None))
    assert plan_to_json(plan_from_json(text)) == text


def test_plan_from_json__job_of_another_version__names_the_key_on_one_line() -> None:
    text = plan_to_json(plan()).replace('"reference": "stored"', '"reference": "precomputed"')
    with pytest.raises(
        PlanError, match=r"^this version .* not accept training\.dpo\.reference .*; use the version that wrote it$"
    ):
        plan_from_json(text)


def test_plan_to_json__nan__is_null() -> None:
    assert json.loads(plan_to_json(plan()))["corpus"]["unigram_perplexity"] is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format_version": 99}', "null"])
def test_plan_from_json__not_a_plan__is_rejected(text: str) -> None:
    with pytest.raises(PlanError):
        plan_from_json(text)


def test_for_world_size__allowed_sizes__have_a_plan() -> None:
    made = plan(resources__workers="2..5")
    assert [world.batch.world_size for world in made.worlds] == [2, 3, 4, 5]
    assert made.for_world_size(3).batch.world_size == 3
    with pytest.raises(PlanError, match=r"2\.\.5"):
        made.for_world_size(6)


LONG = {"training__global_batch_size": 16_384, "resources__workers": "1..10000"}


def test_make_plan__10_000_workers__lists_few_and_plans_any() -> None:
    made, full = plan(**LONG), plan(**LONG | {"resources__workers": "900..1100"})
    sizes = [world.batch.world_size for world in made.worlds]
    assert sizes[0] == 1 and sizes[-1] == 10_000 and sizes == sorted(set(sizes))
    assert len(sizes) < 200 and made.num_unlisted == 10_000 - len(sizes)
    assert {2**power for power in range(14)} < set(sizes)
    assert all(b - a <= max(1, a / 16) for a, b in pairwise(sizes))
    assert len(plan_to_json(made)) < 500_000
    assert [made.for_world_size(size) for size in range(900, 1101)] == list(full.worlds)
    assert full.num_unlisted == 0
    assert made.for_world_size(9_999).batch.world_size == 9_999
    with pytest.raises(PlanError, match=r"1\.\.10000 workers, not 10001"):
        made.for_world_size(10_001)


def test_make_plan__10_000_gpus_and_every_choice_open__estimates_memory_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_estimates: Counter[int] = Counter()

    def counted(*arguments: Any, world_size: int, **options: Any) -> MemoryEstimate:
        num_estimates[world_size] += 1
        return estimate_memory(*arguments, world_size=world_size, **options)

    monkeypatch.setattr("forge.plan.world_size.estimate_memory", counted)
    h100 = HardwareInfo(device="cuda", name="H100-80GB", memory_bytes=80 * 2**30, peak_flops=None)
    # Too much for few workers, so that groups and degrees of every size are tried.
    facts = tiny_facts(
        num_parameters=70_000_000_000, num_trainable_parameters=70_000_000_000, hidden_size=8192, num_layers=80,
        num_attention_heads=64, num_key_value_heads=64, max_seq_len=None,
    )  # fmt: skip
    job = tiny_job(**LONG, training__zero={"stage": 3}, training__sequence_parallel="auto", data__seq_len=4096)
    made = make_draft(job, model=facts, hardware=h100)
    assert {world.group_size for world in made.worlds} >= {1, 8}
    assert len(made.worlds) < 200
    assert sum(num_estimates.values()) < 100 * len(made.worlds)


def test_make_plan__more_workers_than_the_batch_feeds__names_the_number_of_the_job_file() -> None:
    message = r"64 sequences cannot feed 10000 workers: it feeds at most 64, and 9936 of them would be idle"
    with pytest.raises(PlanError, match=message):
        plan(**LONG | {"training__global_batch_size": 64})


def test_listed_sizes__all_ranges__have_their_ends_and_a_bounded_length() -> None:
    for low, high in ((1, 256), (1, 257), (255, 16_384), (5_000, 10_000), (9_000, 9_300), (16_384, 16_384)):
        sizes = listed_sizes(Range(low=low, high=high))
        assert sizes[0] == low and sizes[-1] == high and list(sizes) == sorted(set(sizes))
        assert len(sizes) <= MAX_LISTED and (high - low >= MAX_LISTED or list(sizes) == [*range(low, high + 1)])


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"total_steps": 7}, 7), ({"total_tokens": 12 * 16 * 3 + 1}, 4), ({"epochs": 1}, 9), ({"epochs": 0.2}, 2)],
)
def test_make_plan__any_length__becomes_whole_steps(length: dict[str, float], steps: int) -> None:
    changes = {"training__total_steps": None} | {f"training__{key}": value for key, value in length.items()}
    assert plan(**changes).total_steps == steps


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ({"total_tokens": 12 * 16 * 3 + 1}, "total_tokens 577 is 4 steps"),
        ({"epochs": 0.5}, "epochs 0.5 is 5 steps"),
    ],
)
def test_make_plan__warm_up_longer_than_a_length_in_any_unit__is_refused(
    length: dict[str, float], said: str
) -> None:
    changes: dict[str, object] = {f"training__{key}": value for key, value in length.items()}
    changes |= {"training__total_steps": None, "training__schedule": {"warmup": 6}}
    message = r"training\.schedule\.warmup: is longer than the training: 6 warm-up steps, but "
    with pytest.raises(PlanError, match=message + said) as caught:
        plan(**changes)
    assert caught.value.job_key == "training.schedule.warmup"


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"warmup": "961 tokens"}, r"warmup: is longer than the training: 6 warm-up steps, but .* is 5 steps"),
        ({"kind": "wsd", "warmup": "961 tokens"}, r"warmup: is longer than the training: 6 warm-up"),
        (
            {"kind": "wsd", "warmup": "50%", "decay": "60%"},
            r"decay: is longer than the training: 3 decay steps after 3 of warm-up, but .* is 5 steps",
        ),
    ],
)
def test_make_plan__schedule_longer_than_the_training__is_refused(schedule: dict[str, object], said: str) -> None:
    changes: dict[str, object] = {"training__total_steps": None, "training__total_tokens": 12 * 16 * 5}
    with pytest.raises(PlanError, match=said):
        plan(**changes, training__schedule=schedule)


def test_schedule_steps__lengths_in_any_unit__are_whole_steps() -> None:
    made = plan(
        training__total_steps=100, training__schedule={"kind": "wsd", "warmup": "3.5%", "decay": "1k tokens"}
    )
    assert (made.schedule_steps.warmup, made.schedule_steps.decay) == (4, 6)
    text = plan_to_json(made)
    assert plan_from_json(text).schedule_steps == made.schedule_steps


@pytest.mark.parametrize("length", [{"total_tokens": 2**62}, {"epochs": 1e6}])
def test_make_plan__length_beyond_every_run__is_refused(length: dict[str, float]) -> None:
    corpus = replace(CORPUS, num_train_sequences=10**6)
    changes = {"training__total_steps": None} | {f"training__{key}": value for key, value in length.items()}
    with pytest.raises(PlanError, match=rf"training\.{next(iter(length))}: is [0-9,]+ steps; a run has at most"):
        plan(corpus, **changes)


def draft(**changes: object) -> DraftPlan:
    return make_draft(tiny_job(**changes), model=tiny_facts(), hardware=CPU)


def test_make_draft__epochs_without_a_corpus__are_refused() -> None:
    with pytest.raises(PlanError, match="prepared"):
        draft(training__total_steps=None, training__epochs=1)


def test_make_draft__everything_but_the_corpus__is_that_of_the_plan() -> None:
    made, whole = json.loads(plan_to_json(draft())), json.loads(plan_to_json(plan()))
    assert whole.pop("corpus")["digest"] == "d"
    assert made == whole


def test_plan_from_json__draft_of_a_dry_run__is_refused() -> None:
    with pytest.raises(PlanError, match="dry run"):
        plan_from_json(plan_to_json(draft()))


def test_make_plan__tokenizer_larger_than_vocabulary__is_rejected() -> None:
    with pytest.raises(PlanError, match=r"500 tokens.*128.*372"):
        plan(replace(CORPUS, vocab_size=500))


def test_make_plan__sequences_longer_than_positions__are_rejected() -> None:
    with pytest.raises(PlanError, match=r"32.*16"):
        plan(data__seq_len=32)


NO_ISOLATION = tiny_facts(isolation_problem="TinyMixer takes no position_ids")


@pytest.mark.parametrize(
    ("data_format", "instead"), [("text", "use none, or concatenate"), ("my_data:Reviews", "use none")]
)
def test_make_draft__shared_rows_without_isolation__are_rejected(data_format: str, instead: str) -> None:
    code = {"code": "./src"} if ":" in data_format else {}
    job = tiny_job(data__packing="examples", data__format=data_format, **code)
    with pytest.raises(PlanError, match=rf"data\.packing: TinyMixer takes no position_ids, .*; {instead}$"):
        make_draft(job, model=NO_ISOLATION, hardware=CPU)
    make_draft(job, model=tiny_facts(), hardware=CPU)


@pytest.mark.parametrize("changes", [{"data__packing": "none"}, {"data__packing": "concatenate"}])
def test_make_draft__rows_of_one_example__need_no_isolation(changes: dict[str, str]) -> None:
    job = tiny_job(**changes)
    without = make_draft(job, model=NO_ISOLATION, hardware=CPU)
    assert replace(without, model=tiny_facts()) == make_draft(job, model=tiny_facts(), hardware=CPU)


def test_make_draft__objective_of_the_user__keeps_examples_apart_itself() -> None:
    job = tiny_job(data__packing="examples", training__objective="my_losses:Ranking", code="./src")
    without = make_draft(job, model=NO_ISOLATION, hardware=CPU)
    assert replace(without, model=tiny_facts()) == make_draft(job, model=tiny_facts(), hardware=CPU)


def test_make_plan__less_memory__lowers_auto_micro_batch() -> None:
    roomy = plan(hardware=replace(CPU, memory_bytes=10**9)).for_world_size(1)
    libraries = round(LIBRARIES_BYTES / USABLE_SHARE)
    tight = plan(hardware=replace(CPU, memory_bytes=1_950_000 + libraries)).for_world_size(1)
    hopeless = plan(hardware=replace(CPU, memory_bytes=10**5)).for_world_size(1)
    assert roomy.batch.micro_batch_size > tight.batch.micro_batch_size >= 1
    assert (roomy.fits, tight.fits, hopeless.fits) == (True, True, False)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_config__every_world_size__keeps_the_batch_identity(stage: int) -> None:
    for world in plan(training__zero={"stage": stage}, resources__workers="1..12").worlds:
        config = world.deepspeed
        product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        assert config["train_batch_size"] == product * world.batch.world_size
        assert config["zero_optimization"]["stage"] == stage


def test_estimate_memory__zero_stages__follow_the_paper() -> None:
    sizes = [plan(training__zero={"stage": s}).for_world_size(4).memory for s in (0, 1, 2, 3)]
    parameters = tiny_facts().num_parameters
    assert sizes[0].state_bytes == 16 * parameters
    assert sizes[1].optimizer_bytes == sizes[0].optimizer_bytes // 4
    assert sizes[2].gradients_bytes == sizes[1].gradients_bytes // 4
    assert sizes[3].weights_bytes == sizes[2].weights_bytes // 4


@pytest.mark.parametrize(
    ("parameters", "workers", "is_on_host", "gathered", "bucket", "reduced"),
    [
        # 7 billion in modules of at most 131 million, in bf16: 2 * (1000 + 131 + 50 + 131), 2 * 50 and 2 * 131 MB.
        (7_000, 8, False, 2_624, 100, 262),
        # 40 million: all of them live, and all in the buffer; a GPU allocates the bucket whole.
        (40, 8, False, 160, 100, 80),
        # On CPU pages that are not written take no memory, and gloo copies what it reduces.
        (40, 2, True, 160, 80, 160),
        (40, 1, True, 0, 80, 160),
    ],
)
def test_estimate_memory__zero_3__gathers_ahead_and_reduces_buckets(
    parameters: int, workers: int, is_on_host: bool, gathered: int, bucket: int, reduced: int
) -> None:
    sizes = {"num_parameters": parameters * 10**6, "num_trainable_parameters": parameters * 10**6}
    need = estimate_memory(
        tiny_facts(**sizes, largest_module_parameters=min(131, parameters) * 10**6),
        tiny_job(training__zero={"stage": 3}).training,
        world_size=workers,
        micro_batch_size=1,
        seq_len=16,
        is_on_host=is_on_host,
        state=OptimizerState(sharded_bytes=8 * parameters * 10**6, replicated_bytes=0),
    )
    found = [need.gathered_bytes, need.bucket_bytes, need.reduction_bytes]
    assert found == [gathered * 10**6, bucket * 10**6, reduced * 10**6]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("engine", "alone", "together"), [("elastic", 2, 4), ("ray-train", 1, 1)])
def test_estimate_memory__host__holds_snapshots_and_replicas(
    stage: int, engine: str, alone: int, together: int
) -> None:
    for world_size, num_copies in ((1, alone), (4, together)):
        made = plan(training__zero={"stage": stage}, resources={"workers": "1..4", "gpu": "none", "engine": engine})
        need = made.for_world_size(world_size).memory
        assert need.host_bytes == num_copies * (12 * tiny_facts().num_parameters // world_size)
        held = round(HOST_ACTIVATIONS * (need.activations_bytes + need.gathered_bytes)) + need.bucket_bytes
        held += max(need.update_bytes, need.reduction_bytes)
        assert need.total_bytes == need.state_bytes + held + need.host_bytes + LIBRARIES_BYTES


def test_estimate_memory__offload__moves_optimizer_to_the_host() -> None:
    gpu = HardwareInfo(device="cuda", name="test", memory_bytes=None, peak_flops=None)
    changes = {"hardware": gpu, "training__ema": {"decay": 0.9}}
    kept = plan(training__zero={"stage": 2}, **changes).for_world_size(2)
    moved = plan(training__zero={"stage": 2, "offload": "cpu"}, **changes).for_world_size(2)
    states = kept.memory.optimizer_bytes + kept.memory.ema_bytes
    assert moved.memory.optimizer_bytes == moved.memory.ema_bytes == 0
    assert moved.memory.total_bytes == kept.memory.total_bytes - states
    assert moved.memory.host_bytes == kept.memory.host_bytes + states
    assert moved.deepspeed["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_optimizer" not in kept.deepspeed["zero_optimization"]


@pytest.mark.parametrize(
    ("change", "is_same_curve"),
    [
        ({"resources__workers": "2"}, True),
        ({"training__zero": {"stage": 3}}, True),
        ({"checkpoint": {"every": "7 steps"}}, True),
        ({"training__optimizer": {"lr": 2e-2}}, False),
        ({"training__global_batch_size": 6}, False),
        ({"data__seed": 9}, False),
    ],
)
def test_config_digest__depends_only_on_what_shapes_the_loss(
    change: dict[str, object], is_same_curve: bool
) -> None:
    assert (config_digest(tiny_job(**change), code=None) == config_digest(tiny_job(), code=None)) is is_same_curve
