"""Fork a checkpoint for another run: equal tensors, another config digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.checkpoint.fork import fork_checkpoint
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import Storage, open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.errors import CheckpointError
from tests.support.checkpoints import model_shape, progress, write

STEP = "step-00000002"


def read_all(storage: Storage) -> dict[str, bytes]:
    checkpoint = open_checkpoint(storage, STEP)
    found = {}
    for name in model_shape().parameters:
        interval = checkpoint.value_interval(name)
        data = bytearray(interval.size_bytes)
        checkpoint.read([(interval, memoryview(data))])
        found[name] = bytes(data)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Storage:
    write(str(tmp_path / "donor"), 2, world_size=3)
    return open_storage(str(tmp_path / "donor"))


@pytest.fixture
def target(tmp_path: Path) -> Storage:
    write(str(tmp_path / "receiver"), 1)
    write(str(tmp_path / "receiver"), 2)
    return open_storage(str(tmp_path / "receiver"))


def test_fork__replaces_target__with_equal_tensors_and_its_config_digest(source: Storage, target: Storage) -> None:
    fork_checkpoint(source, target, step=2, config_digest="another")
    assert list_checkpoints(target) == [STEP]
    assert verify_checkpoint(target, STEP) is None
    assert open_checkpoint(target, STEP).progress.config_digest == "another"
    assert read_all(target) == read_all(source)
    assert open_checkpoint(source, STEP).progress == progress(2)


def test_fork__repeated__changes_nothing(source: Storage, target: Storage) -> None:
    fork_checkpoint(source, target, step=2, config_digest="another")
    before = target.files(STEP)
    fork_checkpoint(source, target, step=2, config_digest="another")
    assert target.files(STEP) == before


def test_fork__interrupted_before_publish__can_be_repeated(
    source: Storage, target: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(target, "publish", lambda *_, **__: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(CheckpointError, match="power cut"):
            fork_checkpoint(source, target, step=2, config_digest="another")
    assert list_checkpoints(target) == []  # and the source is kept
    fork_checkpoint(source, target, step=2, config_digest="another")
    assert read_all(target) == read_all(source)


def test_fork__broken_source__is_refused_and_target_kept(source: Storage, target: Storage) -> None:
    part = next(Path(source.url, STEP).glob("part-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        fork_checkpoint(source, target, step=2, config_digest="another")
    assert len(list_checkpoints(target)) == 2
