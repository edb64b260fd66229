"""checkpoint.keep_best: the best evaluation is saved at its step, stays, and is found at any world size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forge.checkpoint.best import best_scores, open_verified
from forge.checkpoint.manifest import state_bytes
from forge.checkpoint.reader import list_checkpoints
from forge.checkpoint.storage import open_storage
from forge.events import CheckpointSaved, Evaluated
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from forge.train.best_checkpoint import BestCheckpoints
from forge.train.process_group import join_process_group
from tests.support.checkpoints import model_shape, progress, write
from tests.support.jobs import tiny_job, tiny_plan
from tests.support.ranks import Recording, on_ranks, run_ranks

STEPS = 10


def overfitting_plan(corpus: CorpusInfo, **changes: object) -> Plan:
    """A job whose held-out loss gets worse in the end, since its learning rate is far too high."""
    return tiny_plan(
        corpus,
        **{
            "training__total_steps": STEPS,
            "training__evaluate_every": "1 step",
            "training__optimizer": {"lr": 0.1, "grad_clip": 0},
            "training__schedule": {"warmup": 10, "kind": "constant"},
            "checkpoint": {"keep": 1, "keep_best": 1, "every": "1000 steps"},
            **changes,
        },
    )


def losses_of(recording: Recording) -> dict[int, float]:
    return {event.step: event.loss for event in recording.events if isinstance(event, Evaluated)}


def steps_in(folder: Path) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in list_checkpoints(open_storage(str(folder))))


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_keep_best__loss_rises_again__keeps_the_step_of_the_lowest_and_the_last(
    corpus: CorpusInfo, tmp_path: Path, world_size: int, stage: int
) -> None:
    plan = overfitting_plan(corpus, training__zero={"stage": stage})
    whole = run_ranks(plan, tmp_path, world_size=world_size)
    losses = losses_of(whole)
    best = min(losses, key=losses.__getitem__)
    assert 1 < best < STEPS, "the job must have its best evaluation before its end"
    assert steps_in(tmp_path) == [best, STEPS]
    score = best_scores(open_storage(str(tmp_path)), count=1)[0]
    assert (score.step, score.value) == (best, losses[best])
    assert open_verified(open_storage(str(tmp_path)), step="best").progress.step == best
    saved = [event for event in whole.events if isinstance(event, CheckpointSaved)]
    assert [event.step for event in saved if event.is_best][-1] == best


def test_keep_best__stopped_and_resumed_at_another_world_size__is_that_of_the_whole_run(
    corpus: CorpusInfo, tmp_path: Path
) -> None:
    plan = overfitting_plan(corpus)
    losses = losses_of(run_ranks(plan, tmp_path / "parts", world_size=2, stop_after=5))
    losses |= losses_of(run_ranks(plan, tmp_path / "parts", world_size=1))
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert steps_in(tmp_path / "parts") == [min(losses, key=losses.__getitem__), STEPS]


def decide(rank: int, url: str) -> list[bool]:
    join_process_group(device=torch.device("cpu"))
    best = BestCheckpoints(url=url, count=1)
    scored = [
        replace(progress(step), metric="eval/loss", metric_value=value)
        for step, value in ((3, 2.0), (4, 1.0), (5, 1.5), (6, 1.0))
    ]
    found = [best.is_due(one) for one in scored]
    best.forget()  # that of step 4 was not written
    return [*found, best.is_due(scored[2]), best.is_due(progress(7)), best.is_due(scored[3])]


def test_is_due__stored_better_worse_and_failed__follows_what_is_stored(tmp_path: Path) -> None:
    body = replace(progress(3), metric="eval/loss", metric_value=2.0)
    write(str(tmp_path), 3, state=state_bytes(body, model_shape()).decode())
    expected = [False, True, False, False, True, False, True]
    assert on_ranks(decide, str(tmp_path), world_size=2) == [expected, expected]


def test_keep_best__early_stopping_is_set__is_1_unless_given() -> None:
    stopping = {"training__early_stopping": {"metric": "eval/loss"}}
    assert tiny_job().checkpoint.keep_best == 0
    assert tiny_job(**stopping).checkpoint.keep_best == 1
    assert tiny_job(**stopping, checkpoint__keep_best=0).checkpoint.keep_best == 0


def test_keep_best__nothing_is_held_out__is_refused() -> None:
    with pytest.raises(ValueError, match=r"chosen by held-out data, but data.held_out is 0"):
        tiny_job(checkpoint__keep_best=1, data__held_out=0)
