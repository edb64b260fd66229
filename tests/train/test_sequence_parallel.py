"""Ranks that share sequences: losses and gradients are those of whole sequences."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from forge.model.sequence_parallel import SERVED
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan, make_plan, plan_to_json
from forge.train.sequence_parallel import example_lengths
from forge.train.windowed_attention import windowed_attention
from tests.support.examples import masked_corpus
from tests.support.jobs import CPU, tiny_facts, tiny_job
from tests.support.ranks import Recording, on_ranks, run_ranks, train_one_rank

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
SIZES: dict[str, Any] = HEADS | {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "MistralForCausalLM": GROUPED | {"sliding_window": 6},
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2ForCausalLM": GROUPED | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "LlamaForCausalLM": GROUPED,
    "Phi3ForCausalLM": {"sliding_window": 6},
}
LENGTHS = ([5, 11, 8], [24])
"""Of the examples in each row."""


def shared_plan(corpus: CorpusInfo, **changes: Any) -> Plan:
    """The tiny plan with four heads, in fp32."""
    heads: dict[str, Any] = {f"model__{name}": count for name, count in HEADS.items()}
    job = tiny_job(**heads | {"training__precision": "fp32", "resources__workers": "1..4"} | changes)
    return make_plan(job, model=tiny_facts(**HEADS), corpus=corpus, hardware=CPU)


def assert_equal(found: Recording, whole: Recording) -> None:
    """Losses, gradient norms and the held-out loss are equal."""
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)
    assert [m.grad_norm for m in found.steps] == pytest.approx([m.grad_norm for m in whole.steps], rel=1e-4)
    assert found.steps[-1].held_out_loss == pytest.approx(whole.steps[-1].held_out_loss, rel=1e-5)


@pytest.fixture(scope="module")
def whole(corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return run_ranks(shared_plan(corpus), tmp_path_factory.mktemp("whole"), world_size=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "world_size", "degree", "changes"),
    [
        (0, 2, 2, {}),
        (1, 4, 2, {"training__micro_batch_size": 5}),
        (2, 4, 4, {"training__cross_entropy": "plain"}),
        (3, 4, 2, {"training__activation_checkpointing": True}),
        (3, 4, 4, {}),
    ],
)
def test_losses__degrees_2_and_4__are_those_of_degree_1(
    corpus: CorpusInfo,
    whole: Recording,
    tmp_path: Path,
    stage: int,
    world_size: int,
    degree: int,
    changes: dict[str, Any],
) -> None:
    plan = shared_plan(corpus, training__zero={"stage": stage}, training__sequence_parallel=degree, **changes)
    assert plan.for_world_size(world_size).batch.sequence_parallel_size == degree
    assert_equal(run_ranks(plan, tmp_path, world_size=world_size), whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_losses__spare_rank__are_equal(corpus: CorpusInfo, tmp_path: Path, stage: int) -> None:
    # A single sequence feeds one group, so that 3 ranks are a group of 2 and a spare one.
    changes: dict[str, Any] = {"training__zero": {"stage": stage}, "training__global_batch_size": 1}
    plan = shared_plan(corpus, training__sequence_parallel=2, resources__workers="3", **changes)
    batch = plan.for_world_size(3).batch
    assert (batch.sequence_parallel_size, batch.num_groups, batch.num_spare_ranks) == (2, 1, 1)
    whole = shared_plan(corpus, resources__workers="1", **changes)
    alone = run_ranks(whole, tmp_path / "whole", world_size=1)
    assert_equal(run_ranks(plan, tmp_path / "shared", world_size=3), alone)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["examples", "none"])
def test_losses__examples_in_rows__see_only_themselves(tmp_path: Path, packing: str) -> None:
    corpus = masked_corpus(tmp_path / "corpus", packing=packing)
    changes: dict[str, Any] = {"data__format": "chat", "training__objective": "chat", "data__packing": packing}
    alone = run_ranks(shared_plan(corpus, **changes), tmp_path / "whole", world_size=1)
    plan = shared_plan(corpus, training__sequence_parallel=4, **changes)
    assert_equal(run_ranks(plan, tmp_path / "shared", world_size=4), alone)


@pytest.mark.slow
def test_losses__dropout__are_equal(corpus: CorpusInfo, tmp_path: Path) -> None:
    gpt2 = {
        "architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64,
        "attn_pdrop": 0.0, "resid_pdrop": 0.2, "embd_pdrop": 0.2,
    }  # fmt: skip
    job = tiny_job(model=gpt2, training__precision="fp32", training__sequence_parallel=2, resources__workers="1..2")
    facts = tiny_facts(**HEADS, class_name="GPT2LMHeadModel", architecture="gpt2")
    plan = make_plan(job, model=facts, corpus=corpus, hardware=CPU)
    alone = run_ranks(plan, tmp_path / "whole", world_size=1)
    assert_equal(run_ranks(plan, tmp_path / "shared", world_size=2), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(4, 3), (3, 4), (2, 1)])
def test_resume__another_world_size_and_degree__continues(
    corpus: CorpusInfo, whole: Recording, tmp_path: Path, first: int, second: int
) -> None:
    plan = shared_plan(corpus, training__sequence_parallel=4, training__zero={"stage": 3})
    degrees = [plan.for_world_size(size).batch.sequence_parallel_size for size in (first, second)]
    assert degrees[0] != degrees[1]
    before = run_ranks(plan, tmp_path, world_size=first, stop_after=3)
    after = run_ranks(plan, tmp_path, world_size=second)
    assert before.losses + after.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.slow
def test_gradients__every_served_class__are_those_of_whole_sequences() -> None:
    assert set(OWN_SIZES) <= SERVED
    for errors in on_ranks(gradient_errors, sorted(SERVED), world_size=2):
        assert set(errors) == SERVED
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def gradient_errors(rank: int, names: list[str]) -> dict[str, float]:
    """The largest relative error of loss and gradients of each class, rows with one and with several examples."""
    import torch.distributed as dist
    import transformers

    from forge.train.process_group import join_process_group
    from forge.train.sequence_parallel import SequenceParallel

    torch.set_num_threads(1)
    join_process_group(device=torch.device("cpu"))
    torch.manual_seed(0)
    tokens = torch.randint(3, 64, (2, 24))
    packed = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    errors = {}
    for name in names:
        cls = getattr(transformers, name)
        torch.manual_seed(1)
        model = cls(cls.config_class(**SIZES | OWN_SIZES.get(name, {}))).train()
        errors[name] = 0.0
        for inputs in (
            {"tokens": tokens, "targets": tokens},
            {"tokens": tokens, "targets": tokens, "position_ids": packed},
        ):
            model.set_attn_implementation("eager")
            expected = summed_gradients(model, inputs)
            sequence = SequenceParallel.of(model, 2)
            assert sequence is not None
            found = summed_gradients(model, sequence.split(inputs))
            for own in found:
                dist.all_reduce(own)
            worst = [
                (one - other).abs().max() / other.abs().max() for one, other in zip(found, expected, strict=True)
            ]
            errors[name] = max(errors[name], float(max(worst)))
    return errors


def summed_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The summed cross entropy and its gradients, in one tensor."""
    model.zero_grad()
    positions = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
    logits = model(input_ids=inputs["tokens"], use_cache=False, **positions).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, inputs["targets"].flatten(), reduction="sum")
    loss.backward()
    gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
    return [loss.detach(), torch.cat(gradients)]


@pytest.mark.slow
def test_windowed_attention__computed_again__same_gradients() -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, heads, 101, 8, requires_grad=True) for heads in (4, 2, 2)]

    def attend(*whole: torch.Tensor) -> torch.Tensor:
        query, key, value = whole
        return windowed_attention(query, key, value, scaling=None, window=17, chunk=16).square()

    again = checkpoint(attend, *given, use_reentrant=False)
    one, other = (torch.autograd.grad(out.sum(), given) for out in (attend(*given), again))
    assert all(map(torch.equal, one, other))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"), [(1, {}), (2, {"training__activation_checkpointing": True}), (3, {})]
)
def test_own_time__slow_rank_of_a_group__is_that_of_the_slow_rank_alone(
    corpus: CorpusInfo, tmp_path: Path, stage: int, changes: dict[str, Any]
) -> None:
    changes = changes | {"training__zero": {"stage": stage}, "training__sequence_parallel": 2}
    plan = shared_plan(corpus, **changes)
    assert plan.for_world_size(2).batch.num_groups == 1  # all ranks wait for the slow one in every layer
    fast, slow = on_ranks(own_times, plan_to_json(plan), str(tmp_path), world_size=2)
    assert len(fast) == len(slow) == plan.total_steps
    assert median(slow) > 2 * median(fast)


def own_times(rank: int, plan_json: str, folder: str) -> list[float]:
    """Seconds of each step that a rank took by itself; the layers of rank 1 take 20 ms more."""
    import time

    from forge.train import worker

    build, times = worker.build_engine, []

    def build_timed(*arguments: Any, **options: Any) -> Any:
        engine = build(*arguments, **options)
        engine.own_time.on_step = times.append
        for layer in engine.model.model.layers:
            for linear in (layer.mlp.up_proj, layer.mlp.down_proj) if rank == 1 else ():
                linear.forward = delayed(linear.forward)
        return engine

    def delayed(forward: Any) -> Any:
        def slow_forward(*arguments: Any) -> Any:
            time.sleep(0.01)
            return forward(*arguments)

        return slow_forward

    worker.build_engine = build_timed
    train_one_rank(rank, plan_json, folder, 2, None)
    return times


def test_example_lengths__padding__is_one_more_example() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 0, 0, 0, 0, 0]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [1, 1, 2, 3, 0, 0, 0, 0]])
    assert example_lengths(positions, segments) == [[3, 2, 3], [1, 7], [2, 1, 1, 4]]
    assert example_lengths(positions[1:2], None) == [[1, 7]]
