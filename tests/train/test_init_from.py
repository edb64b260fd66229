"""Training from the checkpoint of another run: the same curve as from its exported weights, at any world size and
ZeRO stage, and nothing but the checkpoint that the plan names."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.errors import CheckpointError
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from forge.runtime.resolve_init import init_info
from forge.serve.export import ExportRequest, export
from tests.support.jobs import tiny_plan
from tests.support.ranks import run_ranks

FIRST_STEPS = 4


@pytest.fixture(scope="module")
def checkpoint(corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run at world size 2, and beside it its export in fp32."""
    folder = tmp_path_factory.mktemp("first") / "run" / "checkpoints"
    run_ranks(tiny_plan(corpus, training__total_steps=FIRST_STEPS), folder, world_size=2)
    export(ExportRequest(url=str(folder), to=str(folder.parent / "exported"), dtype="fp32"))
    return folder / f"step-{FIRST_STEPS:08d}"


def plan_from(source: Path, corpus: CorpusInfo, **changes: Any) -> Plan:
    model = {"from_pretrained": str(source)}
    plan = tiny_plan(corpus, **{"model": model, "training__total_steps": 3, **changes})
    return replace(plan, init=init_info(plan.job.model.from_pretrained))


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (2, 3), (3, 2)])
def test_train__from_a_checkpoint__has_the_losses_of_its_exported_weights(
    corpus: CorpusInfo, checkpoint: Path, tmp_path: Path, stage: int, world_size: int
) -> None:
    changes = {"training__zero": {"stage": stage}}
    exported = plan_from(checkpoint.parents[1] / "exported", corpus, **changes)
    from_export = run_ranks(exported, tmp_path / "exported", world_size=world_size)
    from_checkpoint = run_ranks(plan_from(checkpoint, corpus, **changes), tmp_path / "own", world_size=world_size)
    assert len(from_checkpoint.losses) == 3
    assert from_checkpoint.losses == from_export.losses


def test_train__from_a_checkpoint__freezes_by_reference_and_resumes(
    corpus: CorpusInfo, checkpoint: Path, tmp_path: Path
) -> None:
    model = {"from_pretrained": str(checkpoint), "freeze": ["model.embed_tokens"]}
    plan = plan_from(checkpoint, corpus, model=model)
    whole = run_ranks(plan, tmp_path / "whole", world_size=1)
    first = run_ranks(plan, tmp_path / "parts", world_size=1, stop_after=1)
    rest = run_ranks(plan, tmp_path / "parts", world_size=1)
    assert [*first.losses, *rest.losses] == whole.losses
    stored = next((tmp_path / "whole").glob("step-*/state-*.json")).read_text()
    assert str(checkpoint) in stored


def test_train__checkpoint_is_damaged__is_refused_before_the_first_step(
    corpus: CorpusInfo, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "donor" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    plan = plan_from(copy, corpus)
    part = next(copy.glob("part-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{copy}: {part.name} does not match its checksum")):
        run_ranks(plan, tmp_path / "own", world_size=2)


def test_train__other_checkpoint_of_the_same_name__is_refused(
    corpus: CorpusInfo, checkpoint: Path, tmp_path: Path
) -> None:
    plan = plan_from(checkpoint, corpus)
    assert plan.init is not None
    other = replace(plan, init=replace(plan.init, digest="0" * 32))
    with pytest.raises(CheckpointError, match="other content than when the plan was made"):
        run_ranks(other, tmp_path / "own", world_size=1)
