"""forge.api: what a run gives back to Python users. `tests/cli` and `tests/runtime` start runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import forge
from forge.errors import ArgumentError
from forge.events import Evaluated, RunFinished
from tests.support.checkpoints import write
from tests.support.runs import make_run


def evaluated(step: int, loss: float) -> Evaluated:
    return Evaluated(
        step=step, loss=loss, metrics={"perplexity": math.exp(loss)}, num_tokens=100, weights="current", seconds=0.1
    )


def test_metrics__recorded_steps__one_float_array_per_metric(tmp_path: Path) -> None:
    make_run(tmp_path, "run", steps=3, endings=[RunFinished(step=3)])
    metrics = forge.load_run("run", root=tmp_path).metrics()
    assert metrics["step"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(metrics["train/loss"], [5.0, 2.5, 5 / 3])
    assert np.isnan(metrics["speed/mfu"]).all()  # recorded as null
    assert {array.dtype for array in metrics.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize(
    ("evaluations", "best"),
    [
        ([evaluated(10, 2.5), evaluated(20, 1.5), evaluated(30, 2.0)], 20),
        ([evaluated(5, 0.5), evaluated(20, 1.5)], 20),  # step 5 has no checkpoint
        ([], 30),  # the newest, if none was evaluated
    ],
)
def test_best_checkpoint__evaluations__lowest_held_out_loss(
    tmp_path: Path, evaluations: list[Evaluated], best: int
) -> None:
    folder = make_run(tmp_path, "run", steps=0, endings=evaluations)
    for step in (10, 20, 30):
        write(str(folder / "checkpoints"), step)
    found = forge.load_run("run", root=tmp_path).best_checkpoint()
    assert found is not None
    assert found.step == best


def test_best_checkpoint__broken_checkpoint__is_skipped(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "run", steps=0, endings=[evaluated(10, 2.0), evaluated(20, 1.0)])
    for step in (10, 20):
        write(str(folder / "checkpoints"), step)
    next((folder / "checkpoints").glob("step-*20/*.safetensors")).unlink()
    found = forge.load_run("run", root=tmp_path).best_checkpoint()
    assert found is not None
    assert found.step == 10


def test_best_checkpoint__no_checkpoints__is_none(tmp_path: Path) -> None:
    make_run(tmp_path, "run")
    assert forge.load_run("run", root=tmp_path).best_checkpoint() is None


def test_load_run__unknown_name__lists_the_runs(tmp_path: Path) -> None:
    make_run(tmp_path, "run")
    with pytest.raises(ArgumentError, match="its runs are run"):
        forge.load_run("other", root=tmp_path)
