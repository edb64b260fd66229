"""LoRA and DoRA adapters: the losses of peft at any world size and stage, and alone in checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from forge.data.loader import TrainBatches
from forge.data.order import SampleOrder
from forge.data.prepare import open_rows
from forge.errors import CheckpointError
from forge.inference.weights import CheckpointWeights
from forge.model.adapter_weights import first_factor
from forge.plan.curve import curve_differences
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from tests.serve.test_export import MODELS
from tests.serve.test_export_adapters import save_base
from tests.support.jobs import synthetic_corpus, tiny_job, tiny_plan
from tests.support.ranks import run_ranks
from tests.train.test_frozen import newest
from tests.train.test_pretrained import save_first_weights

ALL = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return synthetic_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    save_first_weights(folder, "fp32")
    return folder


def plan_of(base: Path, corpus: CorpusInfo, lora: dict[str, Any], **changes: Any) -> Plan:
    changes = {
        "training__precision": "fp32",
        "training__zero": {"stage": 0},
        "training__optimizer": {"lr": 0.05},
    } | changes
    return tiny_plan(corpus, model={"from_pretrained": str(base), "lora": lora}, **changes)


def peft_losses(base: Path, plan: Plan, *, learning_rates: list[float]) -> list[float]:
    """The losses of a plain loop over the plan's batches, with peft's own model."""
    spec, training = plan.job.model.lora, plan.job.training
    assert spec is not None
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.scaled_alpha,
        target_modules=spec.targets[0] if spec.targets == ("all-linear",) else list(spec.targets),
        use_dora=spec.dora,
        use_rslora=spec.rslora,
        modules_to_save=list(spec.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": quantised} if spec.quantize == "nf4" else {}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options), config)
    model.train()  # bitsandbytes packs 4-bit weights in another order on CPU, in evaluation mode
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                plain = name.removeprefix("base_model.model.").replace(".default", "")
                parameter.copy_(first_factor(tuple(parameter.shape), seed=training.seed, name=plain))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = training.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": adam.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
    )
    rows, _ = open_rows(plan.corpus)
    order = SampleOrder(num_samples=rows.num_rows, seed=plan.job.data.seed)
    batches = TrainBatches(rows=rows, order=order, plan=plan.for_world_size(1).batch, rank=0)
    losses = []
    for step, lr in enumerate(learning_rates, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        weight = batches.totals(step).weight
        for batch in batches.of_step(step):
            arrays = {name: torch.from_numpy(values) for name, values in batch.arrays.items()}
            logits = model(input_ids=arrays["tokens"]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), arrays["targets"].flatten(), reduction="sum") / weight
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, adam.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    "lora",
    [
        ALL,
        ALL | {"targets": ["q_proj", "down_proj"], "rslora": True},
        ALL | {"dora": True},
        ALL | {"targets": "q_proj", "modules_to_save": "lm_head"},
        ALL | {"targets": ["q_proj", "up_proj"], "quantize": "nf4"},
    ],
    ids=["all-linear", "by-name-rslora", "dora", "modules-to-save", "qlora"],
)
def test_train__one_rank__has_the_losses_of_peft(
    base: Path, corpus: CorpusInfo, tmp_path: Path, lora: dict[str, Any]
) -> None:
    plan = plan_of(base, corpus, lora)
    ours = run_ranks(plan, tmp_path, world_size=1)
    rates = [metrics.learning_rate for metrics in ours.steps]
    assert ours.losses == pytest.approx(peft_losses(base, plan, learning_rates=rates), rel=2e-5)
    assert ours.losses[-1] < ours.losses[0]


DROPOUT, DORA = ALL | {"dropout": 0.2}, ALL | {"dora": True}


@pytest.mark.parametrize(
    ("lora", "stage", "world_size"),
    [
        (DROPOUT, 3, 2),
        pytest.param(DROPOUT, 2, 3, marks=pytest.mark.slow),
        pytest.param(DORA, 3, 2, marks=pytest.mark.slow),
        *(
            pytest.param(lora, stage, world_size, marks=pytest.mark.slow)
            for lora in (DROPOUT, DORA)
            for stage, world_size in ((0, 3), (1, 2), (3, 1), (3, 3))
        ),
    ],
)
def test_train__any_stage_and_world_size__has_the_losses_of_one_rank(
    base: Path, corpus: CorpusInfo, tmp_path: Path, lora: dict[str, Any], stage: int, world_size: int
) -> None:
    one = run_ranks(plan_of(base, corpus, lora), tmp_path / "one", world_size=1)
    plan = plan_of(base, corpus, lora, training__zero={"stage": stage}, training__activation_checkpointing=True)
    many = run_ranks(plan, tmp_path / "many", world_size=world_size)
    assert many.losses == pytest.approx(one.losses, rel=1e-4)


@pytest.mark.slow
def test_resume__another_world_size_and_stage__keeps_the_curve(
    base: Path, corpus: CorpusInfo, tmp_path: Path
) -> None:
    def plan(stage: int) -> Plan:
        lora = ALL | {"dropout": 0.1}
        return plan_of(base, corpus, lora, training__zero={"stage": stage}, training__ema={"decay": 0.9})

    whole = run_ranks(plan(0), tmp_path / "whole", world_size=1)
    folder = tmp_path / "changed"
    run_ranks(plan(1), folder, world_size=2, stop_after=2)
    run_ranks(plan(3), folder, world_size=3, stop_after=4)
    rest = run_ranks(plan(2), folder, world_size=1)
    assert [metrics.step for metrics in rest.steps] == [5, 6]
    assert rest.losses == pytest.approx(whole.losses[4:], rel=1e-4)
    averages = [
        {name: value for name, value in CheckpointWeights(newest(path), ema=True).tensors() if ".lora_" in name}
        for path in (tmp_path / "whole", folder)
    ]
    assert len(averages[0]) == 28
    for name, value in averages[0].items():
        torch.testing.assert_close(averages[1][name], value, rtol=1e-3, atol=1e-5)


def test_checkpoint__lora__holds_the_adapters_alone(base: Path, corpus: CorpusInfo, tmp_path: Path) -> None:
    plan = plan_of(base, corpus, ALL, training__ema={"decay": 0.9}, training__precision="bf16")
    run_ranks(plan, tmp_path, world_size=2, stop_after=1)
    checkpoint = newest(tmp_path)
    kinds = {name: one.kind for name, one in checkpoint.shape.parameters.items()}
    trained = {name for name, kind in kinds.items() if kind == "master"}
    assert trained == {name for name in kinds if ".lora_" in name}
    assert set(kinds.values()) == {"master", "base"}
    # Rank 4 of 14 layers of 32 × 32, 32 × 64 and 64 × 32.
    num_trained = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert num_trained == sum(math.prod(checkpoint.shape.parameters[name].shape) for name in trained)
    assert sum(part.layout.size_bytes for part in checkpoint.manifest.parts) == 16 * num_trained


def test_resume__another_rank__is_refused_by_name(base: Path, corpus: CorpusInfo, tmp_path: Path) -> None:
    run_ranks(plan_of(base, corpus, ALL), tmp_path, world_size=1, stop_after=1)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is 4×32 in the checkpoint and 8×32 in this model"):
        run_ranks(plan_of(base, corpus, {"rank": 8}), tmp_path, world_size=1)
    with pytest.raises(CheckpointError, match="belongs to another job"):
        run_ranks(plan_of(base, corpus, ALL | {"alpha": 9}), tmp_path, world_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_train__experts_in_one_tensor__has_the_losses_of_one_rank(
    corpus: CorpusInfo, tmp_path: Path, stage: int
) -> None:
    save_base(tmp_path / "base", MODELS["mixtral"])
    lora = ALL | {"targets": ["q_proj", "experts"]}
    one = run_ranks(plan_of(tmp_path / "base", corpus, lora), tmp_path / "one", world_size=1)
    plan = plan_of(tmp_path / "base", corpus, lora, training__zero={"stage": stage})
    many = run_ranks(plan, tmp_path / "many", world_size=2)
    assert many.losses == pytest.approx(one.losses, rel=1e-4)


def test_curve_differences__another_rank__names_the_key() -> None:
    before, now = (tiny_job(model={"from_pretrained": "x", "lora": {"rank": rank}}) for rank in (4, 8))
    assert [difference.key for difference in curve_differences(before, now)] == ["model.lora.rank"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (2, 3)])
def test_train__qlora__any_world_size_and_resume_have_the_losses_of_one_rank(
    base: Path, corpus: CorpusInfo, tmp_path: Path, stage: int, world_size: int
) -> None:
    lora = ALL | {"quantize": "nf4", "dropout": 0.1}
    one = run_ranks(plan_of(base, corpus, lora), tmp_path / "one", world_size=1)
    plan = plan_of(base, corpus, lora, training__zero={"stage": stage}, training__evaluate_every="2 steps")
    first = run_ranks(plan, tmp_path / "many", world_size=world_size, stop_after=3)
    rest = run_ranks(plan_of(base, corpus, lora), tmp_path / "many", world_size=1)
    assert [*first.losses, *rest.losses] == pytest.approx(one.losses, rel=1e-4)
    whole = {name: one.shape for name, one in newest(tmp_path / "many").shape.parameters.items()}
    assert whole["model.layers.0.mlp.up_proj.weight"] == (64, 32)
    assert {one.kind for one in newest(tmp_path / "many").shape.parameters.values()} == {"master", "base"}
