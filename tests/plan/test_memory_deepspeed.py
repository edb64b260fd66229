"""The estimate of model state against DeepSpeed's own estimators, the differences by term."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from forge.plan.memory import MemoryEstimate, estimate_memory
from forge.plan.parameter_groups import OptimizerState
from tests.support.jobs import tiny_facts, tiny_job

# Whole and not, within a machine and over several; the first is the ZeRO paper's model.
PARAMETERS = (7_500_000_000, 1_300_000_011)
WORLDS = ((1, 1), (8, 1), (8, 8))
LARGEST = 131_072_000
ESTIMATORS = f"""
import json
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three
found = {{}}
for parameters in {PARAMETERS}:
    for gpus, nodes in {WORLDS}:
        for offload in (False, True):
            options = dict(
                num_gpus_per_node=gpus, num_nodes=nodes, cpu_offload=offload, additional_buffer_factor=1.0
            )
            key = f"{{parameters}} {{gpus}} {{nodes}} {{offload}}"
            found["2 " + key] = two(parameters, **options)
            found["3 " + key] = three(parameters, {LARGEST}, cpu_offload_params=False, **options)[:2]
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model on a cluster."""

    stage: int
    parameters: int
    world: tuple[int, int]
    """GPUs in a machine, machines."""
    offload: bool

    @property
    def shard(self) -> float:
        return self.parameters / (self.world[0] * self.world[1])

    def estimate(self) -> MemoryEstimate:
        zero = {"stage": self.stage, "offload": "cpu" if self.offload else "none"}
        facts = {"num_parameters": self.parameters, "num_trainable_parameters": self.parameters}
        return estimate_memory(
            tiny_facts(**facts, largest_module_parameters=LARGEST),
            tiny_job(training__zero=zero).training,
            world_size=self.world[0] * self.world[1],
            micro_batch_size=1,
            seq_len=16,
            is_on_host=False,
            state=OptimizerState(sharded_bytes=8 * self.parameters, replicated_bytes=0),
            num_copies=0,
        )


@pytest.fixture(scope="module")
def deepspeed_says() -> dict[str, tuple[int, int]]:
    """Bytes in the memory of a machine and of a GPU; importing DeepSpeed takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", ESTIMATORS], capture_output=True, text=True, timeout=300, check=True
    )
    return {key: (host, gpu) for key, (host, gpu) in json.loads(done.stdout.splitlines()[-1]).items()}


CASES = [
    Case(stage=stage, parameters=parameters, world=world, offload=offload)
    for stage in (2, 3)
    for parameters in PARAMETERS
    for world in WORLDS
    for offload in (False, True)
]


def case_id(case: Case) -> str:
    gpus, machines = case.world
    offload = "-offload" if case.offload else ""
    return f"zero{case.stage}-{case.parameters / 1e9:.1f}B-{machines}x{gpus}{offload}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_estimate_memory__model_state__is_deepspeeds_but_for_named_terms(
    case: Case, deepspeed_says: dict[str, tuple[int, int]]
) -> None:
    key = f"{case.stage} {case.parameters} {case.world[0]} {case.world[1]} {case.offload}"
    host, gpu = deepspeed_says[key]
    need = case.estimate()
    # DeepSpeed counts weights and gradient of the largest module; forge counts what is gathered and reduced apart.
    gathered = 4 * LARGEST if case.stage == 3 else 0
    if case.offload:
        # DeepSpeed counts the gradients' partition in host memory, in fp32; forge on the GPU in 16 bits, until it
        # is moved.
        assert need.state_bytes - 2 * case.shard == pytest.approx(gpu - gathered, rel=1e-6)
        assert host == pytest.approx(max(_initial_bytes(case), _host_bytes(case, need)), rel=1e-6)
        return
    # fp32 gradients of the update: beside 16-bit gradients under ZeRO 2, instead of them under ZeRO 3.
    update = 4 * case.shard if case.stage == 2 else 2 * case.shard
    assert need.state_bytes + update + gathered == pytest.approx(gpu, rel=1e-6)


def _initial_bytes(case: Case) -> float:
    """Every rank's model in fp32 before it is cast; under ZeRO 3 it is sharded from the beginning."""
    return 4 * case.parameters * case.world[0] * case.world[1] if case.stage == 2 else 0


def _host_bytes(case: Case, need: MemoryEstimate) -> float:
    """With the gradients in fp32. DeepSpeed's figure of ZeRO 2 is of all machines, that of ZeRO 3 of one."""
    ranks = case.world[0] * (case.world[1] if case.stage == 2 else 1)
    return (need.host_bytes + 4 * case.shard) * ranks
