"""Memory of a worker, by hand: figure 1 of the ZeRO paper, frozen weights, 4 bits, EMA, the largest micro-batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from forge.plan.memory import MemoryEstimate, estimate_memory, max_micro_batch_size
from forge.plan.parameter_groups import OptimizerState
from tests.support.jobs import tiny_facts, tiny_job

PARAMETERS = 7_500_000_000


def estimate(*, facts: dict[str, Any] | None = None, world_size: int = 64, **training: Any) -> MemoryEstimate:
    """Of 7.5 billion parameters, all of them trained by AdamW unless `facts` says otherwise."""
    facts = {"num_parameters": PARAMETERS, "num_trainable_parameters": PARAMETERS} | (facts or {})
    spec = tiny_job(**{f"training__{name}": value for name, value in training.items()}).training
    return estimate_memory(
        tiny_facts(**facts),
        spec,
        world_size=world_size,
        micro_batch_size=1,
        seq_len=16,
        is_on_host=False,
        state=OptimizerState(sharded_bytes=8 * facts["num_trainable_parameters"], replicated_bytes=0),
    )


@pytest.mark.parametrize(("stage", "gb"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_state__7_5_billion_parameters_on_64_gpus__is_that_of_the_zero_paper(stage: int, gb: float) -> None:
    """Rajbhandari et al., arXiv 1910.02054, figure 1: baseline, P_os, P_os+g and P_os+g+p."""
    state = estimate(zero={"stage": stage}, precision="bf16").state_bytes
    assert round(state / 1e9, 1) == gb


def test_state__fp32__weights_are_their_own_master_copy_at_stage_0_alone() -> None:
    """4 + 4 + 8 bytes of a parameter; a sharded optimizer keeps 4 more in its partition."""
    assert estimate(precision="fp32", zero={"stage": 0}).state_bytes == 16 * PARAMETERS
    assert estimate(precision="fp32", zero={"stage": 1}).state_bytes == 8 * PARAMETERS + 12 * PARAMETERS // 64


def test_state__adapters_of_a_frozen_model__only_they_have_gradients_and_states() -> None:
    trained = 40_000_000
    facts = {"num_trainable_parameters": trained, "num_base_parameters": PARAMETERS - trained}
    need = estimate(facts=facts, zero={"stage": 0}, precision="bf16")
    assert need.weights_bytes == 2 * PARAMETERS
    assert need.gradients_bytes == 2 * trained
    assert need.optimizer_bytes == (4 + 8) * trained
    quantised = estimate(facts=facts | {"num_quantised_parameters": 7_000_000_000}, precision="bf16")
    # QLoRA, arXiv 2305.14314, section 3: 4 bits and 0.127 bits of quantisation constants.
    assert quantised.weights_bytes == pytest.approx(2 * 0.5e9 + 7e9 * 4.127 / 8, rel=1e-4)


def test_state__ema__is_a_sharded_copy_in_fp32() -> None:
    for stage, shards in ((0, 1), (1, 64), (3, 64)):
        kept, none = (estimate(ema=ema, zero={"stage": stage}) for ema in ({"decay": 0.9}, None))
        assert kept.state_bytes - none.state_bytes == kept.ema_bytes == 4 * PARAMETERS // shards


@pytest.mark.parametrize("gib", [1, 2, 3, 5, 6.5, 10])
def test_max_micro_batch__auto__fits_and_one_more_does_not(gib: float) -> None:
    training = tiny_job(training__micro_batch_size="auto").training
    need = partial(
        estimate_memory,
        tiny_facts(num_layers=24, hidden_size=2048, intermediate_size=8192, num_attention_heads=16),
        training,
        world_size=1,
        seq_len=512,
        is_on_host=False,
        state=OptimizerState(sharded_bytes=0, replicated_bytes=0),
    )
    memory_bytes = round(gib * 2**30)
    largest = max_micro_batch_size(training, estimate=need, memory_bytes=memory_bytes)
    assert largest == 1 or need(micro_batch_size=largest).fits(memory_bytes)
    assert largest == 8 or not need(micro_batch_size=largest + 1).fits(memory_bytes)
