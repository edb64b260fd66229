"""TensorBoard's event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import metrics, open_recorder
from tests.support.tracked_run import kill_when, lose_a_node


def read(folder: Path) -> EventAccumulator:
    """All event files of a run folder, without a limit on their number of values."""
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def text_of(found: EventAccumulator, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in found.Tensors(tag)]


def test_tensorboard__steps_events_and_config__are_read_back(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path, tensorboard=True)
    for step in range(1, 5):
        if step == 3:
            lose_a_node(recorder, step)
        recorder.step(metrics(step))
    recorder.close(exit_code=0)
    found = read(tmp_path)
    losses = found.Scalars("train/loss")
    assert [(event.step, event.value) for event in losses] == [
        (step, pytest.approx(5 / step)) for step in range(1, 5)
    ]
    assert "speed/mfu" not in found.Tags()["scalars"]
    assert '"name": "tiny"' in text_of(found, "job")[0]
    assert "node b was lost" in text_of(found, "elastic/event")[0]
    assert text_of(found, "status") == ["finished"]


def test_tensorboard__killed_and_resumed__every_step_once(tmp_path: Path) -> None:
    def has_written() -> bool:
        return any(path.stat().st_size > 3000 for path in tmp_path.glob("tensorboard/*"))

    kill_when(tmp_path, {"tensorboard": True}, steps=300, is_time=has_written)
    (first,) = tmp_path.glob("tensorboard/*")
    first.write_bytes(first.read_bytes()[:-20])  # as after a kill in the middle of a write
    recorder = open_recorder(tmp_path, tensorboard=True)
    for step in range(290, 304):
        recorder.step(metrics(step))
    recorder.close(exit_code=0)
    found = read(tmp_path)
    for tag in ("train/loss", "elastic/world_size"):
        assert Counter(event.step for event in found.Scalars(tag)) == Counter(range(1, 304))
    assert len(text_of(found, "job")) == 1


def test_tensorboard__writing__imports_neither_tensorflow_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.support.runs import metrics, open_recorder\n"
        "recorder = open_recorder(Path(sys.argv[1]), tensorboard=True); recorder.step(metrics(1))\n"
        "recorder.close(exit_code=0); print({'tensorflow', 'torch'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
    assert read(tmp_path).Scalars("train/loss")
