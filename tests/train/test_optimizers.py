"""Every optimizer beside its reference, at several world sizes and ZeRO stages, and across a resize."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forge.config.optimizer import OptimizerSpec
from forge.errors import CheckpointError
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan, plan_to_json
from forge.train.flat_layout import FlatLayout, FlatPiece
from forge.train.optimizer import build_optimizer, reset_state
from tests.support.jobs import tiny_plan
from tests.support.ranks import on_ranks, train_one_rank

GROUPS = {"model.layers.0": {"lr": 3e-3}, "*.mlp.*": {"weight_decay": 0.01}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 1e-2},
    "adamw by group": {"name": "adamw", "lr": 1e-2, "layer_decay": 0.5, "groups": GROUPS},
    "lion": {"name": "lion", "lr": 1e-3},
    "muon": {"name": "muon", "lr": 1e-2},
    "adafactor": {"name": "adafactor", "lr": 5e-2, "weight_decay": 0.1},
}
TOLERANCE = {"muon": 2e-3, "lion": 1e-4}
"""Relative, of the losses. Muon rounds to bf16, Lion takes signs: small differences of gradients become larger."""


class Small(nn.Module):
    """Matrices of several forms, a batch of matrices, vectors and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(7, 6)
        self.tall, self.wide = nn.Linear(6, 11), nn.Linear(11, 5)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))


def stepped(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, lr: float, num_steps: int = 6
) -> dict[str, Tensor]:
    """Return the weights after some steps with gradients that depend on the step and the weights."""
    draw = torch.Generator().manual_seed(5)
    for _ in range(6):
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw) + 0.1 * parameter.detach()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def ours(spec: dict[str, Any], *, lr: float) -> dict[str, Tensor]:
    module = Small()
    optimizer = build_optimizer(module, OptimizerSpec.model_validate(spec), device=torch.device("cpu"))
    reset_state(optimizer, list(whole_layouts(optimizer)))
    return stepped(module, optimizer, lr=lr)


def whole_layouts(optimizer: torch.optim.Optimizer) -> Iterator[FlatLayout]:
    for group in optimizer.param_groups:
        for name, owner in zip(group["param_names"], group["params"], strict=True):
            size = owner.numel()
            piece = FlatPiece(
                name=name,
                shape=tuple(owner.shape),
                start=0,
                stop=size,
                offset=0,
                ranges=((0, size),),
            )
            yield FlatLayout(
                owner=owner,
                algorithm=group["algorithm"],
                pieces=(piece,),
                is_whole=True,
                group=None,
                device=owner.device,
            )


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parameters = list(module.parameters())
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]


def test_adamw__reference__is_torchs() -> None:
    module = Small()
    matrices, vectors = split(module)
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    assert_equal(ours({"name": "adamw"}, lr=0.01), stepped(module, reference, lr=0.01))


def test_adafactor__reference__is_torchs() -> None:
    module = Small()
    matrices, vectors = split(module)
    reference = torch.optim.Adafactor(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        beta2_decay=-0.7,
        d=1.5,
    )
    spec = {"name": "adafactor", "weight_decay": 0.1, "beta2_decay": -0.7, "clip_threshold": 1.5}
    assert_equal(ours(spec, lr=0.3), stepped(module, reference, lr=0.3))


def test_muon__reference__is_torchs() -> None:
    """Embedding and vectors by AdamW; of a batch of matrices each by itself."""
    module, each = Small(), Small()
    del each.experts
    experts = [nn.Parameter(matrix.clone()) for matrix in module.experts.detach()]
    adamw = torch.optim.AdamW(
        [
            {"params": [each.embedding.weight], "weight_decay": 0.1},
            {"params": split(each)[1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    matrices = [each.tall.weight, each.wide.weight, *experts]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    draw = torch.Generator().manual_seed(5)
    for _ in range(6):
        for optimizer in (adamw, muon):
            for group in optimizer.param_groups:
                group["lr"] = 0.02
        for name, parameter in module.named_parameters():
            gradient = torch.randn(parameter.shape, generator=draw)
            if name == "experts":
                for matrix, own in zip(experts, gradient, strict=True):
                    matrix.grad = own + 0.1 * matrix.detach()
            else:
                target = each.get_parameter(name)
                target.grad = gradient + 0.1 * target.detach()
        adamw.step()
        muon.step()
    expected = {
        name: each.get_parameter(name).detach() for name in ("embedding.weight", "tall.weight", "wide.bias")
    }
    expected["experts"] = torch.stack([matrix.detach() for matrix in experts])
    # Gradients here differ from the reference's by rounding, which bf16 makes larger.
    assert_equal(ours({"name": "muon"}, lr=0.02), expected, tolerance=2e-3)


def test_lion__reference__is_the_papers_program() -> None:
    module = Small()
    expected = {name: parameter.detach().double().clone() for name, parameter in module.named_parameters()}
    momentum = {name: torch.zeros_like(value) for name, value in expected.items()}
    draw = torch.Generator().manual_seed(5)
    for _ in range(6):
        for name, weight in expected.items():
            gradient = torch.randn(weight.shape, generator=draw).double() + 0.1 * weight
            update = torch.sign(0.9 * momentum[name] + 0.1 * gradient)
            decay = 0.1 if weight.ndim >= 2 else 0.0
            expected[name] = weight - 0.01 * (update + decay * weight)
            momentum[name] = 0.99 * momentum[name] + 0.01 * gradient
    assert_equal(ours({"name": "lion"}, lr=0.01), {name: value.float() for name, value in expected.items()})


def trained(
    rank: int, plans: Sequence[str], folders: Sequence[str], world_size: int, stop: int | None
) -> list[Any]:
    """Return the losses of several plans, one after the other in one process group."""
    return [
        train_one_rank(rank, plan, folder, world_size, stop).losses
        for plan, folder in zip(plans, folders, strict=True)
    ]


def plan_of(corpus: CorpusInfo, optimizer: str, stage: int) -> Plan:
    return tiny_plan(
        corpus, training__optimizer=OPTIMIZERS[optimizer], training__zero={"stage": stage}, training__total_steps=5,
        training__precision="fp32", training__ema={"decay": 0.9}, checkpoint__every="100 steps",
    )  # fmt: skip


def losses(
    corpus: CorpusInfo, folder: Path, world_size: int, stages: tuple[int, ...]
) -> dict[tuple[str, int], Any]:
    keys = [(optimizer, stage) for optimizer in OPTIMIZERS for stage in stages]
    plans = [plan_to_json(plan_of(corpus, optimizer, stage)) for optimizer, stage in keys]
    folders = [f"{folder}/{optimizer}-{stage}" for optimizer, stage in keys]
    found = on_ranks(trained, plans, folders, world_size, None, world_size=world_size)
    return dict(zip(keys, found[0], strict=True))


@pytest.fixture(scope="module")
def expected(corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one rank at ZeRO 0."""
    found = losses(corpus, tmp_path_factory.mktemp("one"), 1, [0])
    assert len({tuple(each) for each in found.values()}) == len(OPTIMIZERS)
    return {optimizer: each for (optimizer, _), each in found.items()}


def assert_losses(found: list[float], expected: list[float], *, optimizer: str) -> None:
    assert found == pytest.approx(expected, rel=TOLERANCE.get(optimizer, 1e-5)), optimizer


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses__any_world_size_and_stage__are_those_of_one_rank(
    corpus: CorpusInfo, tmp_path: Path, world_size: int, expected: dict[str, list[float]]
) -> None:
    for (optimizer, _), found in losses(corpus, tmp_path, world_size, [0, 1, 2, 3]).items():
        assert_losses(found, expected[optimizer], optimizer=optimizer)


@pytest.mark.slow  # test_state and test_optimizer_8bit hold the same for the quick set
def test_resume__another_world_size_and_stage__keeps_the_curve(
    corpus: CorpusInfo, tmp_path: Path, expected: dict[str, list[float]]
) -> None:
    folders = [f"{tmp_path}/{optimizer}" for optimizer in OPTIMIZERS]
    curves: list[list[float]] = [[] for _ in OPTIMIZERS]
    for world_size, stage, stop in ((3, 3, 2), (2, 1, 4), (1, 0, None)):
        plans = [plan_to_json(plan_of(corpus, optimizer, stage)) for optimizer in OPTIMIZERS]
        for curve, found in zip(
            curves, on_ranks(trained, plans, folders, world_size, stop, world_size=world_size)[0], strict=True
        ):
            curve += found
    for optimizer, curve in zip(OPTIMIZERS, curves, strict=True):
        assert_losses(curve, expected[optimizer], optimizer=optimizer)


def test_resume__another_optimizer__is_refused(corpus: CorpusInfo, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folders = [str(tmp_path / "run")]
    on_ranks(trained, [plan_to_json(plan_of(corpus, "adamw", 1))], folders, 1, 2, world_size=1)
    with pytest.raises(CheckpointError, match="belongs to another job"):
        on_ranks(trained, [plan_to_json(plan_of(corpus, "lion", 1))], folders, 1, None, world_size=1)
