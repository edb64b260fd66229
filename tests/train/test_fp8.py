"""Products in fp8: refused by name where they cannot be; with torchao, emulated on a CPU, the state of bf16."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

from forge.checkpoint.reader import open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.errors import RunError
from forge.events import CompileFailed, Evaluated, LayersCompiled
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.model.fp8_layers import find_fp8_layers
from forge.plan.inputs import CorpusInfo, HardwareInfo
from forge.plan.plan import Plan, make_plan
from forge.train import fp8
from tests.support.jobs import tiny_job
from tests.support.ranks import run_ranks

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed (forge-train[fp8])"
)
H100 = HardwareInfo(device="cuda", name="NVIDIA H100 80GB HBM3", memory_bytes=None, peak_flops=None)
COMPILE_S = 500.0
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = AutoConfig.for_model("llama", vocab_size=48, **SIZES)


def test_use__package_missing__refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"install forge-train\[fp8\] on every machine"):
        fp8.use_fp8(nn.Linear(16, 16), device=torch.device("cpu"), stage=1, recomputes=False)


def test_use__gpu_without_fp8__refused_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10G")
    with pytest.raises(RunError, match=r"capability 8\.9 or above, and NVIDIA A10G has 8\.6"):
        fp8.use_fp8(nn.Linear(16, 16), device=torch.device("cuda:0"), stage=1, recomputes=False)


def planned(corpus: CorpusInfo, *, is_fp8: bool, **changes: Any) -> Plan:
    """A plan for GPUs, which ranks on CPUs carry out."""
    job = tiny_job(training__fp8=is_fp8, training__attention="eager", **changes)
    model = family_of(job.model).inspect(job.model, DataShape(vocab_size=corpus.vocab_size, seq_len=16, eot_id=0))
    return make_plan(job, model=model, corpus=corpus, hardware=H100)


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses__each_stage__near_bf16_and_resumed_bit_for_bit(
    corpus: CorpusInfo, tmp_path: Path, stage: int
) -> None:
    changes = {"training__zero": {"stage": stage}, "training__ema": {"decay": 0.9}}
    plan = planned(corpus, is_fp8=True, **changes)
    whole = run_ranks(plan, tmp_path / "whole", world_size=2)
    plain = run_ranks(planned(corpus, is_fp8=False, **changes), tmp_path / "bf16", world_size=2)
    assert whole.losses != plain.losses, "the products are in bf16"
    assert whole.losses == pytest.approx(plain.losses, rel=0.01)
    first = run_ranks(plan, tmp_path / "parts", world_size=2, stop_after=3)
    second = run_ranks(plan, tmp_path / "parts", world_size=2)
    assert first.losses + second.losses == whole.losses
    evaluated = [[e.loss for e in one.events if isinstance(e, Evaluated)] for one in (whole, second)]
    assert evaluated[0] == evaluated[1] and evaluated[0]
    saved = [open_checkpoint(open_storage(str(tmp_path / name)), "step-00000006") for name in ("whole", "bf16")]
    assert saved[0].shape == saved[1].shape and saved[0].kinds == saved[1].kinds


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model__attention_dropout": 0.1},
        {"training__sequence_parallel": 2},
        {
            "training__zero": {"stage": 3, "hpz_partition_size": 2},
            "training__optimizer": {"name": "muon", "lr": 1e-2},
        },
        {"training__cross_entropy": "plain", "training__global_batch_size": 11},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_losses__with_other_options__near_bf16(corpus: CorpusInfo, tmp_path: Path, changes: dict[str, Any]) -> None:
    found, plain = (
        run_ranks(planned(corpus, is_fp8=is_fp8, **changes), tmp_path / f"{is_fp8}", world_size=2).losses
        for is_fp8 in (True, False)
    )
    assert found != plain
    assert found == pytest.approx(plain, rel=0.01)


@needs_torchao
@pytest.mark.slow
def test_losses__other_ranks_and_micro_batches__as_near_as_in_bf16(corpus: CorpusInfo, tmp_path: Path) -> None:
    found = {}
    for is_fp8 in (True, False):
        for size, micro_batch in ((1, 6), (2, 2), (3, 1)):
            plan = planned(corpus, is_fp8=is_fp8, training__micro_batch_size=micro_batch)
            found[is_fp8, size] = run_ranks(plan, tmp_path / f"{is_fp8}{size}", world_size=size).losses
    deviations = {
        is_fp8: max(abs(a / b - 1) for n in (2, 3) for a, b in zip(found[is_fp8, n], found[is_fp8, 1], strict=True))
        for is_fp8 in (True, False)
    }
    assert deviations[True] < 1e-3


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_losses__recomputed_activations__equal_bit_for_bit(
    corpus: CorpusInfo, tmp_path: Path, checkpointing: bool | str
) -> None:
    for stage in (1, 3):
        found = [
            run_ranks(
                planned(
                    corpus, is_fp8=True, training__zero={"stage": stage}, training__activation_checkpointing=kind
                ),
                tmp_path / f"{stage}{kind}",
                world_size=2,
            ).losses
            for kind in (False, checkpointing)
        ]
        assert found[0] == found[1]


@needs_torchao
@pytest.mark.slow
def test_losses__compiled_layers__near_uncompiled(corpus: CorpusInfo, tmp_path: Path) -> None:
    plain, compiled = (
        run_ranks(
            planned(corpus, is_fp8=True, training__compile=choice, training__total_steps=3),
            tmp_path / choice,
            world_size=1,
            timeout_s=COMPILE_S,
        )
        for choice in ("off", "on")
    )
    assert [e for e in compiled.events if isinstance(e, CompileFailed)] == []
    assert [e for e in compiled.events if isinstance(e, LayersCompiled)]
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-3)


@needs_torchao
@pytest.mark.slow
def test_conversion__layers_of_the_plan__same_parameters_under_the_same_names() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    before = dict(model.named_parameters())
    expected = find_fp8_layers(model)
    fp8.use_fp8(model, device=torch.device("cpu"), stage=1, recomputes=False)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    converted = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert converted == expected.names and len(converted) == expected.info.num_layers == 14
    assert type(model.lm_head) is nn.Linear


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "recomputes", "is_released"), [(2, False, False), (3, True, False), (3, False, True)]
)
def test_backward_pass__weight_was_released__is_gathered_again(
    stage: int, recomputes: bool, is_released: bool
) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    fp8.use_fp8(model, device=torch.device("cpu"), stage=stage, recomputes=recomputes)
    linear: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    values, given = linear.weight.detach().clone(), torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    linear(given).sum().backward()
    expected, given.grad = (given.grad, linear.weight.grad), None
    linear.weight.grad = None
    gathered = StorageWeakRef(linear.weight.untyped_storage())
    result = linear(given).sum()
    linear.weight.data = torch.empty(0, dtype=torch.bfloat16)  # as ZeRO 3 does after the forward pass
    assert gathered.expired() == is_released
    linear.weight.data = values
    result.backward()
    assert torch.equal(given.grad, expected[0]) and torch.equal(linear.weight.grad, expected[1])
