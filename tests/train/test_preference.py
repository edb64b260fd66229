"""Preference pairs by real ranks: the losses do not depend on the machines, whatever the reference is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from tests.support.examples import pair_corpus
from tests.support.jobs import tiny_plan
from tests.support.ranks import run_ranks
from tests.train.test_frozen import newest
from tests.train.test_pretrained import save_first_weights

LORA = {"rank": 4, "alpha": 8, "targets": "all-linear", "dropout": 0.1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return pair_corpus(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    save_first_weights(folder, "fp32")
    return folder


def plan_of(corpus: CorpusInfo, *, stage: int, **changes: Any) -> Plan:
    fixed: dict[str, Any] = {
        "data__format": "preference", "data__packing": corpus.packing, "training__precision": "fp32",
        "training__zero": {"stage": stage}, "training__global_batch_size": 6, "training__total_steps": 5,
    }  # fmt: skip
    return tiny_plan(corpus, **fixed, **changes)


@pytest.mark.parametrize(
    "objective",
    ["live", "adapters", "orpo", "reward"],
)
@pytest.mark.slow  # test_reference trains preference pairs at several world sizes in the quick set
def test_train__any_world_size_and_stage__losses_are_equal_and_a_resize_keeps_the_curve(
    corpus: CorpusInfo, base: Path, tmp_path: Path, objective: str
) -> None:
    changes: dict[str, Any] = {"training__objective": "reward" if objective == "reward" else "orpo"}
    if objective in ("live", "adapters"):
        model = {"from_pretrained": str(base), **({"lora": LORA} if objective == "adapters" else {})}
        changes = {
            "training__objective": "dpo", "training__dpo": {"reference": "live"}, "model": model,
            "training__optimizer": {"lr": 0.05 if objective == "adapters" else 0.001},
        }  # fmt: skip
    alone = run_ranks(plan_of(corpus, stage=0, **changes), tmp_path / "alone", world_size=1)
    assert alone.losses[-1] < alone.losses[0] and len(alone.losses) == 5
    for stage, world_size in ((1, 3), (3, 2)):
        found = run_ranks(plan_of(corpus, stage=stage, **changes), tmp_path / f"{stage}", world_size=world_size)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4), (stage, world_size)
        assert found.steps[-1].held_out_loss == pytest.approx(alone.steps[-1].held_out_loss, rel=1e-4)
        if objective == "live":
            checkpoint = newest(tmp_path / f"{stage}")
            assert set(checkpoint.shape.parameters) == set(newest(tmp_path / "alone").shape.parameters)
            assert set(checkpoint.shape.base.files) == {file.name for file in base.glob("*.safetensors")}
    first = run_ranks(plan_of(corpus, stage=2, **changes), tmp_path / "run", world_size=2, stop_after=2)
    rest = run_ranks(plan_of(corpus, stage=3, **changes), tmp_path / "run", world_size=1)
    assert first.losses + rest.losses == pytest.approx(alone.losses, rel=1e-4)
    margins = [step.extra["train/rewards_margin"] for step in alone.steps]
    assert margins[-1] > margins[0]
