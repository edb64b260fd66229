"""The best checkpoints of a location: which they are, and that they outlive `keep` and a full disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from forge.checkpoint.best import best_name, best_scores, open_verified
from forge.checkpoint.manifest import state_bytes
from forge.checkpoint.reader import list_checkpoints
from forge.checkpoint.space import make_room
from forge.checkpoint.storage import Storage, open_storage
from forge.checkpoint.storage_fs import FolderStorage
from forge.errors import CheckpointError
from tests.support.checkpoints import model_shape, progress, write


def write_scored(
    url: str,
    step: int,
    value: float | None,
    *,
    direction: str = "min",
    metric: str = "eval/loss",
    keep: int = 1,
    keep_best: int = 1,
) -> None:
    scored = replace(
        progress(step),
        metric="" if value is None else metric,
        metric_value=value,
        metric_direction=direction,  # type: ignore[arg-type]
    )
    state = state_bytes(scored, model_shape()).decode()
    write(url, step, state=state, keep=keep, keep_best=keep_best)


def steps_of(storage: Storage) -> list[int]:
    return [int(name.removeprefix("step-")) for name in list_checkpoints(storage)]


@pytest.fixture(params=["folder", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else f"memory://best-{tmp_path.name}"


@pytest.mark.parametrize(
    ("direction", "values", "kept", "best"),
    [
        ("min", [3.0, 1.0, 2.0, 4.0], [4, 2], 2),
        ("max", [3.0, 1.0, 2.0, 2.5], [4, 1], 1),
        ("min", [1.0, 1.0, 1.0], [3, 1], 1),
        ("min", [3.0, None, 2.0, None], [4, 3], 3),
    ],
)
def test_prune__keep_1_and_keep_best_1__leaves_newest_and_best(
    url: str, direction: str, values: list[float | None], kept: list[int], best: int
) -> None:
    for step, value in enumerate(values, start=1):
        write_scored(url, step, value, direction=direction)
    storage = open_storage(url, patience_s=5)
    assert steps_of(storage) == kept
    assert open_verified(storage, step="best").progress.step == best


def test_prune__keep_best_2__leaves_the_two_best(url: str) -> None:
    for step, value in enumerate([5.0, 2.0, 4.0, 1.0, 3.0, 6.0], start=1):
        write_scored(url, step, value, keep_best=2)
    assert steps_of(open_storage(url, patience_s=5)) == [6, 4, 2]


def test_prune__keep_best_0__leaves_only_the_newest(url: str) -> None:
    for step, value in enumerate([1.0, 2.0, 3.0], start=1):
        write_scored(url, step, value, keep_best=0)
    assert steps_of(open_storage(url, patience_s=5)) == [3]


def test_best_name__best_checkpoint_is_damaged__is_the_next_best(tmp_path: Path) -> None:
    for step, value in enumerate([2.0, 1.0, 3.0], start=1):
        write_scored(str(tmp_path), step, value, keep=3)
    storage = open_storage(str(tmp_path))
    assert best_name(storage) == "step-00000002"
    part = next((tmp_path / "step-00000002").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    assert best_name(storage) == "step-00000001"


def test_best_scores__other_metric_than_the_newest_checkpoint__is_not_compared(tmp_path: Path) -> None:
    write_scored(str(tmp_path), 1, 0.9, metric="eval/accuracy", direction="max", keep=3)
    write_scored(str(tmp_path), 2, 3.0, keep=3)
    found = best_scores(open_storage(str(tmp_path)), count=5)
    assert [(score.step, score.metric) for score in found] == [(2, "eval/loss")]


def test_best_name__no_step_was_evaluated__says_how_to_have_one(tmp_path: Path) -> None:
    write_scored(str(tmp_path), 1, None)
    with pytest.raises(CheckpointError, match=r"has no best checkpoint.*checkpoint.keep_best: 1"):
        best_name(open_storage(str(tmp_path)))


def test_make_room__disk_is_full__spares_newest_and_best(tmp_path: Path) -> None:
    for step, value in enumerate([3.0, 1.0, 2.0, 4.0], start=1):
        write_scored(str(tmp_path), step, value, keep=9)
    storage = open_storage(str(tmp_path))
    assert make_room(storage, needed_bytes=None, keep_best=1) == [1, 3]
    assert steps_of(storage) == [4, 2]


@pytest.mark.parametrize(("dies_in", "best_after_kill"), [("publish", 1), ("remove", 2)])
def test_write__killed_around_the_commit_of_a_new_best__leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str, best_after_kill: int
) -> None:
    write_scored(str(tmp_path), 1, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(FolderStorage, dies_in, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        writer = multiprocessing.get_context("fork").Process(target=write_scored, args=(str(tmp_path), 2, 1.0))
        writer.start()
        writer.join()
    assert writer.exitcode == -signal.SIGKILL
    storage = open_storage(str(tmp_path))
    assert open_verified(storage, step="best").progress.step == best_after_kill
    write_scored(str(tmp_path), 3, 1.5)
    write_scored(str(tmp_path), 4, 1.8)
    best = 3 if best_after_kill == 1 else 2
    assert (steps_of(storage), best_name(storage)) == ([4, best], f"step-0000000{best}")
