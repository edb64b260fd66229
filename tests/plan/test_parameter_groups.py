"""Parameter groups: the algorithm, learning rate and weight decay of each parameter, and the state they need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forge.config.optimizer import OptimizerSpec
from forge.errors import PlanError
from forge.plan.inputs import TrainedParameter
from forge.plan.parameter_groups import ParameterGroup, most_gradients, optimizer_state, parameter_groups
from forge.plan.plan import make_plan
from tests.support.jobs import CPU, UNPREPARED, tiny_facts, tiny_job

MODEL = (
    TrainedParameter(name="embed.weight", shape=(100, 8), role="embedding"),
    TrainedParameter(name="layers.0.attn.weight", shape=(8, 8)),
    TrainedParameter(name="layers.0.norm.weight", shape=(8,)),
    TrainedParameter(name="layers.1.attn.weight", shape=(8, 8)),
    TrainedParameter(name="layers.1.experts", shape=(3, 8, 4)),
    TrainedParameter(name="conv.weight", shape=(8, 8, 3), role="convolution"),
    TrainedParameter(name="norm.weight", shape=(8,)),
    TrainedParameter(name="head.weight", shape=(100, 8), role="head"),
)


def groups(**spec: Any) -> tuple[ParameterGroup, ...]:
    return parameter_groups(OptimizerSpec.model_validate(spec), MODEL)


def by_name(**spec: Any) -> dict[str, ParameterGroup]:
    return {parameter.name: group for group in groups(**spec) for parameter in group.parameters}


def test_groups__default__are_matrices_and_vectors() -> None:
    matrices, vectors = groups(weight_decay=0.2)
    assert (matrices.weight_decay, vectors.weight_decay) == (0.2, 0.0)
    assert [parameter.name for parameter in vectors.parameters] == ["layers.0.norm.weight", "norm.weight"]
    assert matrices.numel + vectors.numel == sum(parameter.numel for parameter in MODEL)


def test_groups__patterns__set_rate_and_decay_of_what_they_match() -> None:
    given = {"embed": {"lr": 1e-4}, "*norm*": {"weight_decay": 0.5}, "layers.0.*": {"lr": 2e-3}}
    found = by_name(lr=1e-3, groups=given)
    assert found["embed.weight"].lr_factor == pytest.approx(0.1)
    assert (found["layers.0.norm.weight"].lr_factor, found["layers.0.norm.weight"].weight_decay) == (2.0, 0.5)
    assert (found["norm.weight"].lr_factor, found["norm.weight"].weight_decay) == (1.0, 0.5)


def test_groups__pattern_without_match__is_refused_with_near_names() -> None:
    with pytest.raises(
        PlanError, match=r"'embedding' matches no trained parameter; names like it are embed"
    ) as caught:
        groups(groups={"embedding": {"lr": 1e-4}})
    assert caught.value.job_key == "training.optimizer.groups.embedding"


def test_groups__two_values_for_one_parameter__are_refused_in_any_order() -> None:
    patterns = {"layers.0": {"lr": 1e-4}, "*.attn": {"lr": 2e-4}}
    for given in (patterns, dict(reversed(patterns.items()))):
        with pytest.raises(
            PlanError, match=r"gives layers\.0\.attn\.weight another lr than the pattern '\*\.attn'"
        ):
            groups(groups=given)
    same = {"layers.0": {"lr": 1e-4}, "*.attn": {"lr": 1e-4}}
    assert by_name(lr=1e-4, groups=same)["layers.0.attn.weight"].lr_factor == 1.0


def test_groups__layer_decay__falls_towards_the_embeddings() -> None:
    found = by_name(lr=1e-3, layer_decay=0.5, groups={"layers.0.norm": {"lr": 1e-3}})
    factors = {name: group.lr_factor for name, group in found.items()}
    assert factors == {
        "embed.weight": 0.25, "layers.0.attn.weight": 0.5, "layers.0.norm.weight": 1.0, "layers.1.attn.weight": 1.0,
        "layers.1.experts": 1.0, "conv.weight": 1.0, "norm.weight": 1.0, "head.weight": 1.0,
    }  # fmt: skip


def test_groups__layer_decay_without_layers__is_refused() -> None:
    spec = OptimizerSpec(layer_decay=0.5)
    with pytest.raises(PlanError, match=r"training\.optimizer\.layer_decay: no name of a parameter has the number"):
        parameter_groups(spec, MODEL[:1])


def test_groups__muon__is_for_matrices_between_embeddings_and_head() -> None:
    found = by_name(name="muon")
    muon = {name for name, group in found.items() if group.algorithm == "muon"}
    assert muon == {"layers.0.attn.weight", "layers.1.attn.weight", "layers.1.experts"}
    assert {group.algorithm for group in found.values()} == {"muon", "adamw"}


def test_optimizer_state__each_optimizer__counts_what_it_stores() -> None:
    numel = sum(parameter.numel for parameter in MODEL)
    matrices = 2 * 8 * 8 + 3 * 8 * 4
    assert optimizer_state(groups(name="adamw")).total_bytes == 8 * numel
    assert optimizer_state(groups(name="lion")).total_bytes == 4 * numel
    assert optimizer_state(groups(name="muon")).total_bytes == 8 * numel - 4 * matrices
    state = optimizer_state(groups(name="adafactor"))
    assert state.sharded_bytes == 4 * 16
    assert state.replicated_bytes == 4 * (2 * 108 + 2 * 16 + 3 * 12 + 8 * (8 + 3))
    large = replace(MODEL[0], shape=(1000, 10))
    eight = parameter_groups(OptimizerSpec(name="adamw-8bit"), [large, MODEL[2]])
    assert optimizer_state(eight).total_bytes == 2 * (10_000 + 4 * 40) + 8 * 8


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory__other_optimizers__need_less_than_adamw(stage: int) -> None:
    def optimizer_bytes(name: str) -> int:
        trained = (
            TrainedParameter(name="layers.0.weight", shape=(100, 288)),
            TrainedParameter(name="b", shape=(32,)),
        )
        job = tiny_job(training__optimizer={"name": name}, training__zero={"stage": stage})
        plan = make_plan(job, model=tiny_facts(trained=trained), corpus=UNPREPARED, hardware=CPU)
        return plan.for_world_size(2).memory.optimizer_bytes

    shards = 2 if stage else 1
    assert optimizer_bytes("adamw") - optimizer_bytes("lion") == 4 * 28_832 // shards
    assert optimizer_bytes("adamw") > optimizer_bytes("muon") > optimizer_bytes("adafactor")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "lion", "eps": 1e-8}, "is no hyperparameter of lion, which has lr, weight_decay, beta1, beta2"),
        ({"name": "adamw", "momentum": 0.9}, "is no hyperparameter of adamw"),
        ({"groups": {"a": {}}}, "changes nothing"),
    ],
)
def test_optimizer_spec__key_of_another_optimizer__is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSpec.model_validate(given)


def test_optimizer_spec__defaults__are_those_of_the_optimizer_and_not_written() -> None:
    spec = OptimizerSpec(name="lion")
    assert (spec.lr, spec.beta1, spec.beta2, spec.eps) == (1e-4, 0.9, 0.99, None)
    assert spec.model_dump(exclude_unset=True) == {"name": "lion"}
    assert OptimizerSpec.model_validate(spec.model_dump()) == spec


def test_adamw_8bit__sharded__is_refused_with_what_works() -> None:
    with pytest.raises(ValueError, match=r"needs zero\.stage: 0.*lion and adafactor"):
        tiny_job(training__optimizer={"name": "adamw-8bit"})


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, 64, 5000])
def test_most_gradients__equal_parts__are_all_parameters_that_reach_into_one(num_shards: int) -> None:
    matrices, vectors = optimizer_state(groups()).group_numels
    size = -(-sum(matrices) // num_shards)
    overlapped = [0] * num_shards
    end = 0
    for numel in matrices:
        start, end = end, end + numel
        for part in range(num_shards):
            overlapped[part] += numel * (max(start, part * size) < min(end, (part + 1) * size))
    assert most_gradients((matrices,), num_shards=num_shards) == max(overlapped)
    of_vectors = most_gradients((vectors,), num_shards=num_shards)
    assert most_gradients((matrices, vectors), num_shards=num_shards) == max(overlapped) + of_vectors


def test_memory__zero_2_and_a_large_embedding__gradients_of_whole_parameters() -> None:
    trained = tuple(replace(one, shape=(10**6, 8)) if one.role == "embedding" else one for one in MODEL)
    numel = sum(parameter.numel for parameter in trained)
    facts = tiny_facts(num_parameters=numel, num_trainable_parameters=numel, trained=trained)
    job = tiny_job(training__precision="bf16", training__zero={"stage": 2}, resources__workers="1..4")
    plan = make_plan(job, model=facts, corpus=UNPREPARED, hardware=CPU)
    gradients = [plan.for_world_size(size).memory.gradients_bytes for size in (1, 2, 4)]
    assert gradients[0] == 2 * numel
    assert all(2 * 8 * 10**6 <= one <= 2 * numel for one in gradients[1:])
