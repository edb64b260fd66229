"""Verify and read checkpoints: every fault is detected and named, and the previous checkpoint is used."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from forge.checkpoint.intervals import Interval, Range
from forge.checkpoint.manifest import state_bytes
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import find_checkpoint, verify_checkpoint
from forge.errors import CheckpointError
from tests.support.checkpoints import layout_of, model_shape, progress, values, write

FIRST, SECOND = "step-00000001", "step-00000002"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    write(str(tmp_path), 1)
    write(str(tmp_path), 2)
    return tmp_path


def part_of(folder: Path, rank: int = 1) -> Path:
    return next(folder.glob(f"part-{rank:05d}-*.safetensors"))


def state_of(folder: Path) -> Path:
    return next(folder.glob("state-*.json"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def found_in(root: Path) -> tuple[str | None, list[tuple[str, str]]]:
    skipped: list[tuple[str, str]] = []
    found = find_checkpoint(open_storage(str(root)), on_skip=lambda name, why: skipped.append((name, why)))
    return found.name if found else None, skipped


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte in a part's data": (lambda f: flip(part_of(f), -1), "part-00001.*does not match its checksum"),
    "a flipped byte in a part's header": (
        lambda f: flip(part_of(f), 20),
        "part-00001.*does not match its checksum",
    ),
    "a flipped byte in the state": (lambda f: flip(state_of(f), 30), "state-.*json does not match its checksum"),
    "a flipped byte in the manifest": (lambda f: flip(f / "manifest.json", 60), "manifest.json"),
    "a flipped byte in the manifest's checksum": (lambda f: flip(f / "manifest.json", 12), "manifest.json"),
    "a truncated part": (
        lambda f: part_of(f).write_bytes(part_of(f).read_bytes()[:-8]),
        r"part-00001\S* has \d+ bytes, its manifest says \d+",
    ),
    "a missing part": (lambda f: part_of(f).unlink(), r"part-00001\S* is missing"),
    "a missing state": (lambda f: state_of(f).unlink(), "state-.*json is missing"),
    "a missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "a manifest that is a list": (
        lambda f: (f / "manifest.json").write_text("[1]"),
        "manifest.json cannot be read",
    ),
    "another format version": (
        lambda f: (f / "manifest.json").write_text('{"format_version": 99}'),
        "format version 99, this forge reads 3",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_find__damaged_checkpoint__is_named_and_previous_used(two: Path, fault: str) -> None:
    spoil, reason = FAULTS[fault]
    spoil(two / SECOND)
    found, skipped = found_in(two)
    assert found == FIRST
    assert [name for name, _ in skipped] == [SECOND]
    assert re.search(reason, skipped[0][1])


def test_verify__any_flipped_bit__is_detected(two: Path) -> None:
    rng = random.Random(0)
    storage = open_storage(str(two))
    for path in sorted((two / SECOND).iterdir()):
        content = path.read_bytes()
        for at in rng.sample(range(len(content)), 60):
            spoilt = bytearray(content)
            spoilt[at] ^= 1 << rng.randrange(8)
            path.write_bytes(spoilt)
            assert verify_checkpoint(storage, SECOND) is not None, (path.name, at)
        path.write_bytes(content)
    assert verify_checkpoint(storage, SECOND) is None


def test_find__all_broken__returns_none(two: Path) -> None:
    for name in (FIRST, SECOND):
        part_of(two / name).unlink()
    assert found_in(two)[0] is None


def test_find__missing_folder__returns_none(tmp_path: Path) -> None:
    assert found_in(tmp_path / "nowhere") == (None, [])


def test_list__staging_and_other_folders__are_ignored(two: Path) -> None:
    (two / ".staging-step-00000003-aaaa").mkdir()
    (two / "notes").mkdir()
    assert list_checkpoints(open_storage(str(two))) == [SECOND, FIRST]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_read__any_interval__is_independent_of_writing_world_size(tmp_path: Path, world_size: int) -> None:
    write(str(tmp_path), 5, world_size=world_size)
    checkpoint = open_checkpoint(open_storage(str(tmp_path)), "step-00000005")
    rng = random.Random(world_size)
    for _ in range(200):
        whole = rng.choice(layout_of(0, 1).intervals)
        start = rng.randrange(whole.stop)
        wanted = Interval(
            kind=whole.kind, name=whole.name, start=start, stop=rng.randint(start + 1, whole.stop), dtype="F32"
        )
        buffer = bytearray(wanted.size_bytes)
        checkpoint.read([(wanted, memoryview(buffer))])
        assert np.array_equal(np.frombuffer(buffer, "<f4"), values(wanted, step=5))


def test_read__interval_across_parts__reads_only_its_bytes(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(two))
    checkpoint = open_checkpoint(storage, SECOND)
    asked: list[tuple[str, int]] = []
    read_into = storage.read_into

    def counted(path: str, ranges: Sequence[Range]) -> None:
        asked.extend((path, len(view)) for _, view in ranges)
        read_into(path, ranges)

    monkeypatch.setattr(storage, "read_into", counted)
    wanted = Interval(kind="exp_avg", name="embedding.weight", start=25, stop=35, dtype="F32")
    checkpoint.read([(wanted, memoryview(bytearray(40)))])
    assert sum(size for _, size in asked) == 40
    assert len({path for path, _ in asked}) == 2  # the interval crosses both ranks' parts


def test_part__is_a_valid_safetensors_file(two: Path) -> None:
    for rank in (0, 1):
        tensors = load_file(part_of(two / SECOND, rank))
        intervals = {interval.key: interval for interval in layout_of(rank, 2).intervals}
        assert set(tensors) == set(intervals)
        for key, tensor in tensors.items():
            assert np.array_equal(tensor, values(intervals[key], step=2))


def test_manifest__data_start_and_intervals__locate_each_interval(two: Path) -> None:
    body = json.loads((two / SECOND / "manifest.json").read_text())
    for part in body["parts"]:
        content = (two / SECOND / part["name"]).read_bytes()
        offset = part["data_start"]
        for kind, name, start, stop, dtype in part["intervals"]:
            interval = Interval(kind=kind, name=name, start=start, stop=stop, dtype=dtype)
            assert content[offset : offset + interval.size_bytes] == values(interval, step=2).tobytes()
            offset += interval.size_bytes
        assert offset == len(content)


def test_require_job__another_model__is_refused_with_differing_parameters(two: Path) -> None:
    checkpoint = open_checkpoint(open_storage(str(two)), SECOND)
    other = model_shape(**{"norm.weight": (8,), "head/odd name.weight": None, "bias": (3,)})
    with pytest.raises(CheckpointError) as refused:
        checkpoint.require_job(config_digest="recipe", corpus="corpus", shape=other)
    for message in (
        "another model",
        "it has no bias",
        "head/odd name.weight, which this model does not have",
        "7 in the checkpoint and 8 in this model",
    ):
        assert message in str(refused.value)


@pytest.mark.parametrize(("changed", "message"), [("config_digest", "another job"), ("corpus", "another corpus")])
def test_require_job__another_config_or_corpus__is_refused(two: Path, changed: str, message: str) -> None:
    checkpoint = open_checkpoint(open_storage(str(two)), SECOND)
    own = {"config_digest": "recipe", "corpus": "corpus"} | {changed: "other"}
    with pytest.raises(CheckpointError, match=message):
        checkpoint.require_job(**own, shape=model_shape())


def test_read__missing_elements__error_has_counts(two: Path) -> None:
    checkpoint = open_checkpoint(open_storage(str(two)), SECOND)
    wanted = Interval(kind="master", name="norm.weight", start=0, stop=9, dtype="F32")
    with pytest.raises(CheckpointError, match=r"holds 7 of the 9 elements 0\.\.9 of norm.weight \(master\)"):
        checkpoint.read([(wanted, memoryview(bytearray(36)))])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_prune__keeps_requested_number(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        write(str(tmp_path), step, keep=keep)
    assert list_checkpoints(open_storage(str(tmp_path))) == [f"step-{step:08d}" for step in range(5, 5 - keep, -1)]


def test_prune__broken_checkpoint__is_not_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(str(tmp_path), step, keep=2)
    part_of(tmp_path / "step-00000003").unlink()
    write(str(tmp_path), 4, keep=2)
    storage = open_storage(str(tmp_path))
    whole = [name for name in list_checkpoints(storage) if verify_checkpoint(storage, name) is None]
    assert whole == ["step-00000004", "step-00000002"]


def test_prune__newer_valid_checkpoints__are_kept(tmp_path: Path) -> None:
    for step in (7, 8, 9):
        write(str(tmp_path), step)
    write(str(tmp_path), 3, keep=1)  # a run resumed from an earlier step
    assert set(list_checkpoints(open_storage(str(tmp_path)))) >= {f"step-{step:08d}" for step in (3, 9)}


def test_commit__step_already_saved__keeps_first_checkpoint(tmp_path: Path) -> None:
    write(str(tmp_path), 1)
    before = (tmp_path / FIRST / "manifest.json").read_bytes()
    write(str(tmp_path), 1, world_size=3, token="bbbbbbbb0001")
    assert found_in(tmp_path) == (FIRST, [])
    assert (tmp_path / FIRST / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FIRST]


def test_commit__existing_is_broken__is_replaced(tmp_path: Path) -> None:
    write(str(tmp_path), 1)
    part_of(tmp_path / FIRST).unlink()
    write(str(tmp_path), 1, token="bbbbbbbb0001")
    assert found_in(tmp_path) == (FIRST, [])


def test_commit__existing_is_of_another_job__is_refused(tmp_path: Path) -> None:
    write(str(tmp_path), 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / FIRST).iterdir()}
    state = state_bytes(progress(1, config_digest="other"), model_shape()).decode()
    with pytest.raises(CheckpointError, match="a checkpoint of another job that writes to the same folder"):
        write(str(tmp_path), 1, token="bbbbbbbb0001", state=state)
    assert {path.name: path.read_bytes() for path in (tmp_path / FIRST).iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [FIRST]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A read-only file system that contains one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    write(str(folder), 1)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_save__read_only_folder__fails_and_reading_works(read_only: Path) -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        write(str(read_only), 2)
    assert found_in(read_only) == (FIRST, [])


def test_find__copied_checkpoint__verifies(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / SECOND, tmp_path / "elsewhere" / SECOND)
    assert found_in(tmp_path / "elsewhere") == (SECOND, [])


def test_checkpoint__files__contain_no_pickle(two: Path) -> None:
    for path in (two / SECOND).iterdir():
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())
