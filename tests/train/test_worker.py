"""Workers as real processes with gloo and DeepSpeed: the loss curve does not depend on the machines."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from forge.errors import CheckpointError, RunError
from forge.events import CheckpointSaved, CheckpointSkipped, Evaluated
from forge.plan.inputs import CorpusInfo
from tests.support.jobs import tiny_plan
from tests.support.ranks import Recording, run_ranks

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def reference(corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """One rank, no ZeRO, fp32: the reference for all other configurations."""
    plan = tiny_plan(corpus, training__zero={"stage": 0}, training__precision="fp32")
    return run_ranks(plan, tmp_path_factory.mktemp("reference"), world_size=1)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("stage", STAGES)
def test_losses__any_world_size_and_stage__are_equal(
    corpus: CorpusInfo, reference: Recording, tmp_path: Path, stage: int, world_size: int
) -> None:
    plan = tiny_plan(corpus, training__zero={"stage": stage}, training__precision="fp32")
    found = run_ranks(plan, tmp_path, world_size=world_size)
    assert found.losses == pytest.approx(reference.losses, rel=1e-5)
    assert [m.grad_norm for m in found.steps] == pytest.approx([m.grad_norm for m in reference.steps], rel=1e-4)
    assert found.steps[-1].held_out_loss == pytest.approx(reference.steps[-1].held_out_loss, rel=1e-5)


def test_losses__world_size_does_not_divide_batch__are_equal(
    corpus: CorpusInfo, reference: Recording, tmp_path: Path
) -> None:
    plan = tiny_plan(corpus, training__precision="fp32", training__micro_batch_size=2, resources__workers="5")
    assert plan.for_world_size(5).batch.padding > 0
    assert run_ranks(plan, tmp_path, world_size=5).losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_losses__bf16__match_fp32_within_rounding(
    corpus: CorpusInfo, reference: Recording, tmp_path: Path, stage: int
) -> None:
    found = run_ranks(tiny_plan(corpus, training__zero={"stage": stage}), tmp_path, world_size=2)
    # 2**-8 is bf16's rounding; a few steps of a rate of 1e-2 let it grow a little.
    assert found.losses == pytest.approx(reference.losses, rel=2**-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__cross_entropy": "plain"},
        {"training__activation_checkpointing": True},
        {"training__micro_batch_size": 1},
    ],
)
def test_losses__memory_options__are_equal(
    corpus: CorpusInfo, reference: Recording, tmp_path: Path, changes: dict[str, object]
) -> None:
    found = run_ranks(tiny_plan(corpus, training__precision="fp32", **changes), tmp_path, world_size=2)
    assert found.losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_losses__activation_checkpointing__bit_for_bit(corpus: CorpusInfo, tmp_path: Path, stage: int) -> None:
    found = [
        run_ranks(
            tiny_plan(corpus, training__activation_checkpointing=kind, training__zero={"stage": stage}),
            tmp_path / str(kind),
            world_size=2,
        )
        for kind in (False, True, "selective")
    ]
    assert found[1].losses == found[2].losses == found[0].losses


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_resume__same_world_size__losses_bit_for_bit(
    corpus: CorpusInfo, tmp_path: Path, stage: int, precision: str
) -> None:
    plan = tiny_plan(
        corpus,
        training__zero={"stage": stage},
        training__precision=precision,
        training__ema={"decay": 0.9},
    )
    whole = run_ranks(plan, tmp_path / "whole", world_size=2)
    first = run_ranks(plan, tmp_path / "parts", world_size=2, stop_after=3)
    second = run_ranks(plan, tmp_path / "parts", world_size=2)
    assert [m.step for m in first.steps + second.steps] == [1, 2, 3, 4, 5, 6]
    assert first.losses + second.losses == whole.losses
    assert evaluations(second) == evaluations(whole)


@pytest.mark.parametrize(
    ("stage", "then", "first_size", "second_size"),
    [
        *[(2, 2, 1, 5), (3, 1, 2, 3), (0, 3, 3, 2)],
        *[pytest.param(*way, marks=pytest.mark.slow) for way in [(0, 0, 2, 3), (1, 1, 3, 1), (3, 3, 4, 2)]],
    ],
)
def test_resume__another_world_size_and_stage__same_samples_and_losses(
    corpus: CorpusInfo,
    reference: Recording,
    tmp_path: Path,
    stage: int,
    then: int,
    first_size: int,
    second_size: int,
) -> None:
    fp32 = {"training__precision": "fp32", "resources__workers": "1..5"}
    plan = tiny_plan(corpus, training__zero={"stage": stage}, **fp32)
    first = run_ranks(plan, tmp_path, world_size=first_size, stop_after=3)
    plan = tiny_plan(corpus, training__zero={"stage": then}, **fp32)
    second = run_ranks(plan, tmp_path, world_size=second_size)
    assert first.sample_ids | second.sample_ids == reference.sample_ids
    assert set(first.sample_ids) & set(second.sample_ids) == set()
    assert first.losses + second.losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_resume__bf16_at_another_world_size__matches_within_rounding(
    corpus: CorpusInfo, tmp_path: Path, offload: str
) -> None:
    plan = tiny_plan(corpus, training__zero={"stage": 2, "offload": offload})
    whole = run_ranks(plan, tmp_path / "whole", world_size=2)
    first = run_ranks(plan, tmp_path / "parts", world_size=2, stop_after=3)
    second = run_ranks(plan, tmp_path / "parts", world_size=3)
    assert first.losses == whole.losses[:3]
    # The first loss after loading is that of the same weights; then rounding differs with the order of sums.
    assert second.losses[0] == pytest.approx(whole.losses[3], rel=1e-4)
    assert second.losses == pytest.approx(whole.losses[3:], rel=4e-3)
    assert first.sample_ids | second.sample_ids == whole.sample_ids


def test_ema__end_of_run__is_evaluated_too(corpus: CorpusInfo, tmp_path: Path) -> None:
    found = run_ranks(tiny_plan(corpus, training__ema={"decay": 0.5}), tmp_path, world_size=2)
    assert [weights for weights, _ in evaluations(found)] == ["current", "ema"]
    losses = [loss for _, loss in evaluations(found)]
    assert losses[0] != losses[1]
    assert losses == pytest.approx([losses[0]] * 2, rel=0.1)


@pytest.mark.parametrize("stage", [1, 3])
def test_train__loss_not_finite__stops_and_keeps_checkpoint(corpus: CorpusInfo, tmp_path: Path, stage: int) -> None:
    plan = tiny_plan(
        corpus,
        training__zero={"stage": stage},
        training__optimizer={"lr": 1e30, "grad_clip": 0},
        training__schedule={"kind": "constant"},
        checkpoint__every="1 steps",
    )
    with pytest.raises(RunError, match=r"step \d+: the loss is .*checkpoint of step \d+ is kept.*lr"):
        run_ranks(plan, tmp_path, world_size=2)
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept
    assert not list(tmp_path.glob(".staging*"))


def test_resume__checkpoint_of_another_config__is_refused(corpus: CorpusInfo, tmp_path: Path) -> None:
    run_ranks(tiny_plan(corpus), tmp_path, world_size=1, stop_after=2)
    with pytest.raises(CheckpointError, match="another job"):
        run_ranks(tiny_plan(corpus, training__optimizer={"lr": 1e-3}), tmp_path, world_size=1)


def test_resume__truncated_checkpoint__uses_previous(corpus: CorpusInfo, tmp_path: Path) -> None:
    plan = tiny_plan(corpus, checkpoint__every="2 steps", training__precision="fp32")
    whole = run_ranks(plan, tmp_path, world_size=2)
    torn = next((tmp_path / "step-00000006").glob("part-00001-*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-10])
    again = run_ranks(plan, tmp_path, world_size=2)
    skipped = [event for event in again.events if isinstance(event, CheckpointSkipped)]
    assert [Path(event.folder).name for event in skipped] == ["step-00000006"]
    assert "part-00001" in skipped[0].reason
    before = max(event.step for event in whole.events if isinstance(event, CheckpointSaved) and event.step < 6)
    assert [m.step for m in again.steps] == list(range(before + 1, 7))
    assert again.losses == whole.losses[before:]


def test_train__keep__only_newest_checkpoints_remain(corpus: CorpusInfo, tmp_path: Path) -> None:
    plan = tiny_plan(corpus, checkpoint={"every": "1 steps", "keep": 2})
    found = run_ranks(plan, tmp_path, world_size=2)
    saved = [event.step for event in found.events if isinstance(event, CheckpointSaved)]
    assert saved == sorted(set(saved))  # one at a time: a step is skipped while the previous checkpoint is written
    assert saved[-1] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in saved[-2:]]


def test_train__folder_not_writable__fails_at_end(corpus: CorpusInfo, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError, match="could not be written"):
        run_ranks(tiny_plan(corpus), blocked, world_size=2)


def test_train__gpt2__losses_equal_at_every_stage(corpus: CorpusInfo, tmp_path: Path) -> None:
    gpt2 = {"architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
    losses = [
        run_ranks(
            tiny_plan(corpus, model=gpt2, training__precision="fp32", training__zero={"stage": stage}),
            tmp_path / str(stage),
            world_size=2,
        ).losses
        for stage in (0, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    assert all(map(math.isfinite, losses[0]))


DROPPING = {"architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2,
            "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "world_size"),
    [pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow), (2, 3), (3, 2)],
)
def test_dropout__any_world_size_and_stage__losses_are_equal(
    corpus: CorpusInfo, tmp_path: Path, stage: int, world_size: int
) -> None:
    whole = dropping(corpus, tmp_path / "one")
    found = dropping(corpus, tmp_path / "other", world_size=world_size, training__zero={"stage": stage})
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)


def test_dropout__changes_the_losses(corpus: CorpusInfo, tmp_path: Path) -> None:
    kept = DROPPING | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    plain = run_ranks(tiny_plan(corpus, model=kept, training__precision="fp32"), tmp_path / "plain", world_size=1)
    assert dropping(corpus, tmp_path / "dropped").losses != pytest.approx(plain.losses, rel=1e-3)


def test_dropout__activation_checkpointing__same_masks(corpus: CorpusInfo, tmp_path: Path) -> None:
    whole = dropping(corpus, tmp_path / "whole")
    recomputed = dropping(corpus, tmp_path / "recomputed", training__activation_checkpointing=True)
    assert recomputed.losses == pytest.approx(whole.losses, rel=1e-5)


def test_dropout__resume__losses_bit_for_bit(corpus: CorpusInfo, tmp_path: Path) -> None:
    whole = dropping(corpus, tmp_path / "whole", world_size=2)
    first = dropping(corpus, tmp_path / "parts", world_size=2, stop_after=3)
    second = dropping(corpus, tmp_path / "parts", world_size=2)
    assert first.losses + second.losses == whole.losses


def dropping(
    corpus: CorpusInfo, folder: Path, *, world_size: int = 1, stop_after: int | None = None, **changes: object
) -> Recording:
    plan = tiny_plan(corpus, model=DROPPING, training__precision="fp32", **changes)
    return run_ranks(plan, folder, world_size=world_size, stop_after=stop_after)


def evaluations(recording: Recording) -> list[tuple[str, float]]:
    return [(event.weights, event.loss) for event in recording.events if isinstance(event, Evaluated)]
