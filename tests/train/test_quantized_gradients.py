"""qgZ only where DeepSpeed can form its groups from the GPUs that the ranks see."""

from __future__ import annotations

import os

import pytest

from forge.events import Event, GradientsNotQuantized
from forge.plan.deepspeed_config import deepspeed_config
from forge.train.quantized_gradients import agree_on_quantized_gradients, quantization_problem
from tests.support.jobs import tiny_job, tiny_plan
from tests.support.ranks import RecordingReporter, on_ranks


@pytest.mark.parametrize(
    ("num_gpus", "problem"),
    [
        ([8] * 16, None),
        ([8] * 6, None),
        ([8] * 8, None),
        ([1] * 3, None),
        ([4] * 4 + [3] * 3, "3 ranks see 3 GPUs, 4 ranks see 4 GPUs"),
        ([6] * 6 + [2] * 2, "different numbers of GPUs"),
        ([4] * 7, "7 ranks are no multiple of the 4 GPUs"),
    ],
)
def test_quantization_problem__gpus_by_rank__whole_and_equal_nodes_only(
    num_gpus: list[int], problem: str | None
) -> None:
    found = quantization_problem(num_gpus)
    assert (found is None) == (problem is None)
    assert problem is None or problem in str(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_gpus", "is_quantised"), [((2, 2, 2, 2), True), ((3, 3), True), ((2, 2, 2), False), ((2, 2, 1), False)]
)
def test_agree__real_ranks__qgz_where_deepspeed_forms_its_groups(
    num_gpus: tuple[int, ...], is_quantised: bool
) -> None:
    found = on_ranks(agree, num_gpus, world_size=len(num_gpus))
    configs = [config for config, _, _ in found]
    assert ["zero_quantized_gradients" in config for config in configs] == [is_quantised] * len(num_gpus)
    assert all(config["stage"] == 3 for config in configs)
    events = found[0][1]
    assert [type(event) for event in events] == ([] if is_quantised else [GradientsNotQuantized])
    if len(set(num_gpus)) == 1:  # otherwise the ranks form different groups, and may wait for each other for ever
        assert [has_groups for _, _, has_groups in found] == [is_quantised] * len(num_gpus)


def agree(rank: int, num_gpus: tuple[int, ...]) -> tuple[dict[str, object], list[Event], bool | None]:
    """Return the configuration of ZeRO and the events, and whether DeepSpeed itself forms its groups."""
    import torch
    from deepspeed.utils import groups

    from forge.train.process_group import join_process_group

    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(num_gpus[rank])}  # the CPU's count of devices
    join_process_group(device=torch.device("cpu"))
    job = tiny_job(training__zero={"stage": 3})
    training = job.training.model_copy(
        update={"zero": job.training.zero.model_copy(update={"quantized_gradients": True})}
    )
    reporter = RecordingReporter(None)
    batch = tiny_plan().for_world_size(1).batch
    config = agree_on_quantized_gradients(deepspeed_config(training, batch), reporter=reporter)
    has_groups = None
    if len(set(num_gpus)) == 1:
        try:
            groups._get_local_all_to_all_group()
            has_groups = True
        except AssertionError:
            has_groups = False
    return config["zero_optimization"], reporter.recording.events, has_groups
