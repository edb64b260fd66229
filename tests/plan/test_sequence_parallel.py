"""The degree of sequence parallelism at every world size, and who takes which rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.config.training import TrainingSpec
from forge.errors import PlanError
from forge.plan.batch import plan_batch
from forge.plan.inputs import HardwareInfo, TeacherInfo, TrainedParameter
from forge.plan.machines import interconnect
from forge.plan.plan import DraftPlan, make_draft
from forge.plan.sequence_parallel import longest_sequences
from forge.report.sequence_text import sequence_facts
from tests.support.jobs import CPU, tiny_facts, tiny_job

EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8}


def degrees(
    *, workers: str = "1..8", batch: int = 8, memory_gib: float | None = None, **changes: Any
) -> dict[int, int]:
    """The degree at every world size of a job with eight heads."""
    job = tiny_job(resources__workers=workers, training__global_batch_size=batch, **changes)
    memory = None if memory_gib is None else int(memory_gib * 2**30)
    plan = make_draft(job, model=tiny_facts(**EIGHT), hardware=replace(CPU, memory_bytes=memory))
    return {world.batch.world_size: world.batch.sequence_parallel_size for world in plan.worlds}


def test_degree__number__divides_or_least_computation() -> None:
    # 5 ranks: 8 sequences are two each in groups of 1, of 2 (with a spare rank) 4 halves, of 4 8 quarters: equal.
    # 6: two each, or 3 halves in 3 groups of 2; 7: two each, 3 halves, or 8 quarters.
    assert degrees(training__sequence_parallel=4) == {1: 1, 2: 2, 3: 1, 4: 4, 5: 4, 6: 2, 7: 2, 8: 4}
    assert set(degrees(training__sequence_parallel=1).values()) == {1}


def test_degree__auto__is_1_where_sequences_fit_or_memory_is_unknown() -> None:
    assert set(degrees().values()) == {1}
    assert set(degrees(memory_gib=64).values()) == {1}


def test_degree__auto_and_little_memory__is_the_lowest_that_fits() -> None:
    job = tiny_job(resources__workers="1..8", data__seq_len=2**17)
    facts = tiny_facts(**EIGHT, hidden_size=1024, intermediate_size=4096, num_layers=8, max_seq_len=None)
    plan = make_draft(job, model=facts, hardware=replace(CPU, device="cuda", memory_bytes=16 * 2**30))
    at = {world.batch.world_size: world for world in plan.worlds}
    assert at[1].fits is False
    assert [at[size].batch.sequence_parallel_size for size in (1, 2, 4, 8)] == [1, 1, 4, 4]
    assert at[4].fits and at[8].fits and not at[2].fits
    # A lower degree divides no world size of 5 to 7; ranks after a group of 4 are spare.
    assert [(at[size].batch.sequence_parallel_size, at[size].batch.num_spare_ranks) for size in (5, 7)] == [
        (4, 1),
        (4, 3),
    ]
    assert at[4].memory.activations_bytes < 0.3 * at[2].memory.activations_bytes


def test_degree__more_workers_than_sequences__groups_are_fed() -> None:
    assert degrees(workers="8", batch=2, training__sequence_parallel=4) == {8: 4}
    with pytest.raises(PlanError, match=r"8 workers: it feeds at most 4 at 2 workers for each sequence"):
        degrees(workers="8", batch=2, training__sequence_parallel=2)


@pytest.mark.parametrize(
    ("degree", "facts", "problem"),
    [
        (
            3,
            EIGHT,
            "3, which does not divide the 8 attention heads and 8 key-value heads and 16 tokens of data.seq_len",
        ),
        (
            4,
            EIGHT | {"num_key_value_heads": 2},
            "4, which does not divide the 2 key-value heads; possible are 1, 2",
        ),
        (2, {}, "the number of attention heads of LlamaForCausalLM is unknown"),
        (2, EIGHT | {"sequence_parallel_problem": "Bloom is not supported"}, "Bloom is not supported; use 1"),
    ],
)
def test_degree__impossible__is_refused_by_name(degree: int, facts: dict[str, Any], problem: str) -> None:
    job = tiny_job(training__sequence_parallel=degree)
    with pytest.raises(PlanError, match=problem) as raised:
        make_draft(job, model=tiny_facts(**facts), hardware=CPU)
    assert raised.value.job_key == "training.sequence_parallel"


@pytest.mark.parametrize(
    ("zero", "gpus", "size"),
    [
        ({}, 8, 4),
        ({"hpz_partition_size": 2}, 8, 4),
        ({"hpz_partition_size": 8}, 8, 8),
        ({"shard_group_size": 8}, 8, 8),
        ({"shard_group_size": 6}, 12, 12),
        ({"shard_group_size": 6}, 8, 4),  # no node holds whole groups of both kinds
        ({"shard_group_size": 8}, 4, 4),
        ({"shard_group_size": 8}, 1, 4),
    ],
)
def test_node_group_size__sequence_and_state_groups__both_on_a_node_or_the_sequence(
    zero: dict[str, Any], gpus: int, size: int
) -> None:
    job = tiny_job(
        resources__workers="24",
        training__sequence_parallel=4,
        training__zero={"stage": 3, "shard_group_size": "all", "hpz_partition_size": 1} | zero,
    )
    links = interconnect(gpus_per_node=gpus, gbps=100)
    plan = make_draft(job, model=tiny_facts(**EIGHT), hardware=CPU, links=links)
    assert plan.for_world_size(24).node_group_size == size


@pytest.mark.parametrize(("size", "objective"), [(0, "causal-lm"), (-2, "chat"), (2, "masked-lm"), (2, "seq2seq")])
def test_config__degree_without_meaning__is_refused(size: int, objective: str) -> None:
    body = {"total_steps": 1, "sequence_parallel": size, "objective": objective}
    with pytest.raises(ValueError, match=r"is for the objectives|number of ranks"):
        TrainingSpec.model_validate(body)


@given(size=st.integers(1, 40), world_size=st.integers(1, 24), degree=st.integers(1, 8), micro=st.integers(1, 5))
def test_share__any_degree__groups_cover_the_batch_once(
    size: int, world_size: int, degree: int, micro: int
) -> None:
    if degree > world_size or world_size // degree > size:
        return
    batch = plan_batch(size, world_size=world_size, max_micro_batch_size=micro, sequence_parallel_size=degree)
    shares = [batch.share(rank) for rank in range(world_size)]
    taken = [row for low, high in shares[: batch.num_groups * degree : degree] for row in range(low, high)]
    assert taken == list(range(size))
    for rank, (low, high) in enumerate(shares):
        group = rank // degree
        assert (low, high) == (shares[group * degree] if group < batch.num_groups else (size, size))
        assert high - low <= batch.micro_batch_size * batch.gradient_accumulation_steps
    assert batch.padding >= 0


def test_longest_sequences__degrees__grow_in_proportion() -> None:
    from forge.plan.memory import MemoryEstimate, estimate_memory
    from forge.plan.parameter_groups import OptimizerState

    job = tiny_job()
    facts = tiny_facts(**EIGHT, hidden_size=1024, intermediate_size=4096, num_layers=8)

    def estimate(degree: int, length: int) -> MemoryEstimate:
        return estimate_memory(
            facts, job.training, world_size=8, micro_batch_size=1, seq_len=length, is_on_host=False,
            state=OptimizerState(sharded_bytes=0, replicated_bytes=0), sequence_parallel_size=degree,
        )  # fmt: skip

    found = longest_sequences((1, 2, 4), estimate=estimate, memory_bytes=16 * 2**30, most=None)
    assert found[2] == pytest.approx(2 * found[1], rel=0.02)
    assert found[4] == pytest.approx(4 * found[1], rel=0.02)
    for degree, length in found.items():
        assert estimate(degree, length).fits(16 * 2**30)
        assert not estimate(degree, length + 64 * degree).fits(16 * 2**30)
    assert longest_sequences((2,), estimate=estimate, memory_bytes=16 * 2**30, most=1001) == {2: 1000}


LARGE: dict[str, Any] = EIGHT | {
    "num_parameters": 10**9, "num_trainable_parameters": 10**9, "num_matmul_parameters": 9 * 10**8,
    "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "attention_width": 2048,
}  # fmt: skip
H100_LIKE = replace(CPU, device="cuda", name="unknown GPU", memory_bytes=80 * 2**30)


def draft_at(
    seq_len: int,
    *,
    facts: dict[str, Any] | None = None,
    teacher: TeacherInfo | None = None,
    hardware: HardwareInfo | None = None,
    **changes: Any,
) -> DraftPlan:
    """The plan of a large model that takes its positions from `data.seq_len`, as new ones do."""
    job = tiny_job(
        **{"resources__workers": "8", "training__global_batch_size": 64} | changes, data__seq_len=seq_len
    )
    model = tiny_facts(**LARGE | {"max_seq_len": seq_len} | (facts or {}))
    return make_draft(job, model=model, hardware=hardware or H100_LIKE, teacher=teacher)


def lengths(plan: DraftPlan) -> dict[int, int]:
    """The longest sequences of the plan's line, by degree."""
    line = dict(sequence_facts(plan))["longest sequence"]
    if "by ranks that share it: " not in line:
        return {1: int(line.split()[0].replace(",", ""))}
    pairs = [pair.split(" at ") for pair in line.split("share it: ")[1].split(";")[0].split(", ")]
    return {int(degree): int(length.replace(",", "")) for length, degree in pairs}


TEACHER = TeacherInfo(
    source="t", digest="d", class_name="T", num_parameters=2 * 10**9, forward_flops_per_token=1, vocab_size=128
)


@pytest.mark.parametrize(
    ("changes", "teacher"),
    [
        ({}, None),
        ({"training__zero": {"stage": 2, "shard_group_size": 2}}, None),
        ({"training__zero": {"stage": 3, "hpz_partition_size": 4}}, None),
        ({"training__micro_batch_size": 4, "training__activation_checkpointing": True}, None),
        (
            {
                "training__objective": "distillation",
                "training__distillation": {"teacher": "/t", "digest": "0" * 32},
            },
            TEACHER,
        ),
        (
            {"training__objective": "dpo", "data__format": "preference", "model": {"from_pretrained": "/base"}},
            None,
        ),
    ],
)
def test_longest_sequence__of_the_plan__fits_and_the_next_one_does_not(
    changes: dict[str, Any], teacher: TeacherInfo | None
) -> None:
    of_model = {"max_seq_len": None}
    found = lengths(draft_at(64, facts=of_model, teacher=teacher, **changes))
    assert list(found) == ([1] if "training__objective" in changes else [1, 2, 4, 8])
    micro = {"training__micro_batch_size": 1} | changes
    for degree, length in found.items():
        shared = micro | {"training__sequence_parallel": degree}
        assert length > 64
        for tokens, fits in ((length, True), (length + 64 * degree, False)):
            world = draft_at(tokens, facts=of_model, teacher=teacher, **shared).worlds[-1]
            assert (world.fits, world.batch.sequence_parallel_size) == (fits, degree), (degree, tokens)


def test_longest_sequence__groups_that_the_plan_chooses__are_not_in_its_way() -> None:
    sizes: dict[str, Any] = {name: 7 * LARGE[name] for name in LARGE if name.startswith("num_p") or "_p" in name}
    gpu = {"hardware": replace(H100_LIKE, name="H100-80GB"), "facts": sizes | {"max_seq_len": None}}
    changes: dict[str, Any] = {"resources__workers": "64", "training__sequence_parallel": 1}
    changes["training__zero"] = {"stage": 3}
    plan = draft_at(64, **gpu, **changes)
    assert plan.worlds[-1].groups.num_shard_groups > 1
    longest = lengths(plan)[1]
    found = [draft_at(length, **gpu, **changes).worlds[-1] for length in (longest, longest + 64)]
    assert [world.fits for world in found] == [True, False]


def test_longest_sequence__groups__leave_less_room() -> None:
    stage = {"training__zero": {"stage": 2}}
    groups = {"training__zero": {"stage": 2, "shard_group_size": 2}}
    assert lengths(draft_at(64, **groups))[1] < lengths(draft_at(64, **stage))[1]


def test_longest_sequence__learned_positions__their_table_grows() -> None:
    def found(name: str) -> int:
        # A rest that makes the sizes add up; 64 positions of the table are among the parameters.
        table = TrainedParameter(name=name, shape=(64, 2048), role="embedding")
        rest = TrainedParameter(name="rest", shape=(10**9 - table.numel,))
        return lengths(draft_at(64, facts={"trained": (table, rest), "num_key_value_heads": 1}))[1]

    assert found("transformer.wpe.weight") < found("transformer.wte.weight")


@pytest.mark.parametrize(
    ("model", "positions", "line"),
    [
        ({}, 4096, "at 8"),
        ({"max_position_embeddings": 4096}, 4096, "the model has positions for 4,096"),
        ({}, 8192, "the model has positions for 8,192"),  # of a class that does not take the number of the data
    ],
)
def test_longest_sequence__positions__limit_it_where_they_do_not_follow_the_data(
    model: dict[str, Any], positions: int, line: str
) -> None:
    changes = {f"model__{key}": value for key, value in model.items()}
    plan = draft_at(4096, facts={"max_seq_len": positions}, **changes)
    text = dict(sequence_facts(plan))["longest sequence"]
    assert text.endswith(line)
    assert (max(lengths(plan).values()) <= positions) is ("positions" in line)


def test_longest_sequence__pretrained__is_limited() -> None:
    job = tiny_job(model={"from_pretrained": "/somewhere"}, training__sequence_parallel=2, resources__workers="2")
    plan = make_draft(job, model=tiny_facts(**EIGHT | {"max_seq_len": 16}), hardware=H100_LIKE)
    assert lengths(plan) == {1: 16, 2: 16}


def test_longest_sequence__one_rank_per_sequence__is_said_shortly() -> None:
    problem = {"sequence_parallel_problem": "BloomForCausalLM is not supported"}
    facts = dict(sequence_facts(draft_at(2048, facts=problem)))
    assert "sequences" not in facts
    assert facts["longest sequence"].endswith("tokens fit at 8 workers")
    facts = dict(sequence_facts(draft_at(2**20, facts=problem)))
    assert facts["sequences"] == "ranks cannot share any: BloomForCausalLM is not supported"
    assert lengths(draft_at(2**20, facts=problem)) == lengths(draft_at(2048, facts=problem))


def test_longest_sequence__nothing_fits_or_memory_unknown__is_said() -> None:
    facts = dict(sequence_facts(draft_at(64, facts={"num_parameters": 10**11})))
    assert "none at 1, none at 2" in facts["longest sequence"]
    plan = make_draft(tiny_job(), model=tiny_facts(**EIGHT), hardware=CPU)
    assert sequence_facts(plan) == []
    facts = dict(sequence_facts(draft_at(64, facts={"activation_bytes_per_row": 1000})))
    assert facts["longest sequence"].startswith("unknown: the memory of LlamaForCausalLM")
