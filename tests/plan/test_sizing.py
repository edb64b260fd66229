"""The model that a limit buys, on offered machines."""

from __future__ import annotations

import dataclasses
from datetime import date

import pytest

from forge.config.dump import dump_plain
from forge.config.load import load_job_text
from forge.errors import PlanError
from forge.plan.forecast import gpu_hardware
from forge.plan.machines import Machines, offered_machines
from forge.plan.plan import make_plan
from forge.plan.scaling import BESIROGLU
from forge.plan.sized_job import BASE_JOB, job_comment, left_out_note, require_sizable, sized_job, vocab_size_of
from forge.plan.sizing import PATIENCE_HOURS, Goal, Limit, patient_run, size_run
from forge.pricing.offer import Offer
from tests.support.jobs import UNPREPARED

H100 = Offer(
    cloud="aws",
    instance="p5.48xlarge",
    gpu="H100-80GB",
    num_gpus=8,
    gpu_memory_gib=80,
    num_cpus=192,
    memory_gib=2048,
    inter_node_gbps=3200,
    region="us-east-1",
    zone=None,
    usd_per_hour=55.04,
    spot_usd_per_hour=26.42,
    interruption=None,
    observed=date(2026, 6, 1),
    source="a list",
    co2_g_per_hour=None,
)
DEAR_H100 = dataclasses.replace(H100, region="eu-west-1", usd_per_hour=80.0)
OFFERS = (H100, DEAR_H100)


def ladder(**options: object) -> list[list[Machines]]:
    return offered_machines(OFFERS, spot=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("usd", [50, 5000, 300_000])
def test_budget__h100_machines__spent_but_not_exceeded(usd: float) -> None:
    run = patient_run(Goal(limit=Limit(kind="usd", amount=usd)), ladder())
    assert run.usd is not None
    assert 0.9 * usd <= run.usd.likely <= 1.01 * usd
    assert "us-east-1" in run.machines.name
    best = BESIROGLU.best_scale(run.scale.training_flops)
    assert run.shape.num_parameters == pytest.approx(best.num_parameters, rel=0.1)
    assert run.hours.likely <= PATIENCE_HOURS


def test_budget__large__machines_are_added_until_14_days() -> None:
    run = patient_run(Goal(limit=Limit(kind="usd", amount=300_000)), ladder())
    assert run.machines.num_gpus == 8 * 32
    assert run.hours.likely > PATIENCE_HOURS / 2


def test_hours__given_gpus__kept_to() -> None:
    (machines,) = ladder(num_gpus=64)[0]
    run = size_run(Goal(limit=Limit(kind="hours", amount=24)), machines)
    assert run is not None
    assert 21 <= run.hours.likely <= 24.3
    assert run.tokens_per_s.low < run.tokens_per_s.likely < run.tokens_per_s.high


@pytest.mark.parametrize(("gbps", "num_gpus", "count"), [(25, 16, 2), (1e6, 16, 1), (25, 8, 1)])
def test_hours__slow_network__groups_as_the_plan_of_the_job(gbps: float, num_gpus: int, count: int) -> None:
    offer = dataclasses.replace(H100, inter_node_gbps=gbps)
    ((machines,),) = offered_machines([offer], spot=False, num_gpus=num_gpus)
    run = size_run(Goal(limit=Limit(kind="hours", amount=24 * 30)), machines)
    assert run is not None
    assert run.groups.num_shard_groups == count
    job = load_job_text(dump_plain(sized_job(run, base=BASE_JOB)), path="job.yaml").job
    plan = make_plan(
        job,
        model=run.shape.model_info(),
        corpus=UNPREPARED,
        hardware=gpu_hardware(machines.gpu),
        links=machines.interconnect,
    )
    world = plan.for_world_size(num_gpus)
    assert (world.groups, world.batch) == (run.groups, run.batch)


def test_flops__hand_checked__6_n_d() -> None:
    run = patient_run(Goal(limit=Limit(kind="flops", amount=1e20)), ladder())
    assert 6 * run.shape.num_parameters * run.num_tokens == pytest.approx(1e20, rel=1e-6)


def test_inference__a_trillion_tokens__smaller_model_for_the_same_money() -> None:
    goal = Goal(limit=Limit(kind="usd", amount=5000))
    plain = patient_run(goal, ladder())
    small = patient_run(dataclasses.replace(goal, inference_tokens=1e12), ladder())
    assert small.shape.num_parameters < plain.shape.num_parameters / 2
    assert small.num_tokens > 2 * plain.num_tokens
    assert small.usd is not None
    assert small.usd.likely <= 5050


def test_budget__below_one_step__error_with_what_a_step_takes() -> None:
    with pytest.raises(PlanError, match=r"1e-09 USD is too little: a single step"):
        patient_run(Goal(limit=Limit(kind="usd", amount=1e-9)), ladder())


def test_flops__larger_than_any_machine_holds__error_names_the_largest() -> None:
    with pytest.raises(PlanError, match="fits on none of the machines"):
        patient_run(Goal(limit=Limit(kind="flops", amount=1e26)), ladder(num_gpus=8))


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"num_gpus": 12}, "12 GPUs cannot be made of machines that have 8")],
)
def test_machines__not_offered__error_says_what_is(options: dict[str, object], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        ladder(**options)


def test_machines__without_a_price__left_out() -> None:
    unpriced = dataclasses.replace(H100, usd_per_hour=0.0)
    with pytest.raises(PlanError, match="has a known price"):
        offered_machines([unpriced], spot=False)


def test_job__of_a_run__loads_and_has_its_size() -> None:
    run = patient_run(Goal(limit=Limit(kind="usd", amount=5000)), ladder())
    loaded = load_job_text(job_comment(run) + dump_plain(sized_job(run, base=BASE_JOB)), path="sized.yaml")
    job = loaded.job
    assert job.training.total_tokens == run.num_tokens
    assert job.training.global_batch_size == run.batch.global_batch_size
    assert job.model.config_overrides["hidden_size"] == run.shape.hidden_size
    assert str(job.resources.workers) == "4..8"
    assert job.resources.max_usd == 5000
    assert job.name == "sized-" + f"{run.shape.num_parameters / 1e9:.2f}b".replace(".", "-")


def test_job__with_sections_of_its_own__kept() -> None:
    base = {
        "name": "mine",
        "model": {"architecture": "llama", "rope_theta": 1e6},
        "data": {"files": "a.jsonl", "tokenizer": {"train": "bpe", "vocab_size": 1000}, "seq_len": 512},
        "training": {"epochs": 2, "optimizer": {"name": "lion", "lr": 1.0}, "seed": 7},
        "checkpoint": {"keep": 9},
    }
    goal = Goal(limit=Limit(kind="usd", amount=100), vocab_size=vocab_size_of(base), seq_len=512)
    job = sized_job(patient_run(goal, ladder()), base=base)
    assert job["model"]["rope_theta"] == 1e6
    assert "vocab_size" not in job["model"]
    assert "epochs" not in job["training"]
    assert job["training"]["optimizer"]["name"] == "lion"
    assert job["training"]["seed"] == 7
    assert job["checkpoint"] == {"keep": 9}


def test_job__products_in_fp8__refused_for_a_gpu_without_them() -> None:
    base = {**BASE_JOB, "training": {"fp8": True}}
    a100 = [dataclasses.replace(H100, gpu="A100-80GB", instance="p4de.24xlarge")]
    goal = Goal(limit=Limit(kind="usd", amount=100))
    with pytest.raises(PlanError, match=r"^training\.fp8: .* A100-80GB has 8\.0; name another GPU with --gpu"):
        sized_job(patient_run(goal, offered_machines(a100, spot=False)), base=base)
    assert sized_job(patient_run(goal, ladder()), base=base)["training"]["fp8"] is True


def test_left_out_note__keys_of_zero__are_named() -> None:
    base = {**BASE_JOB, "training": {"zero": {"stage": 3, "shard_group_size": 8}}}
    assert (left_out_note(base) or "").startswith("left out: training.zero.shard_group_size; ")
    assert left_out_note({**BASE_JOB, "training": {"zero": {"stage": 3}}}) is None


@pytest.mark.parametrize("size", ["abc", 0, -5, 2.5])
def test_vocabulary__not_a_number_of_tokens__error(size: object) -> None:
    with pytest.raises(PlanError, match="not a number of tokens"):
        vocab_size_of({**BASE_JOB, "model": {"architecture": "llama", "vocab_size": size}})


@pytest.mark.parametrize(
    "change",
    [{"model": {"from_pretrained": "x"}}, {"model": {"architecture": "gpt2"}}, {"training": {"objective": "chat"}}],
)
def test_job__whose_size_is_given__error_with_the_key(change: dict[str, object]) -> None:
    with pytest.raises(PlanError, match=r"^(model|training\.objective):"):
        require_sizable({**BASE_JOB, **change})
