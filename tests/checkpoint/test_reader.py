"""What is believed of a checkpoint: every fault is found and named, and the one before is taken."""

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
def test_a_fault_is_named_and_the_checkpoint_before_is_taken(two: Path, fault: str) -> None:
    spoil, reason = FAULTS[fault]
    spoil(two / SECOND)
    found, skipped = found_in(two)
    assert found == FIRST
    assert [name for name, _ in skipped] == [SECOND]
    assert re.search(reason, skipped[0][1])


def test_no_single_flipped_bit_anywhere_goes_unseen(two: Path) -> None:
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


def test_with_everything_broken_there_is_none(two: Path) -> None:
    for name in (FIRST, SECOND):
        part_of(two / name).unlink()
    assert found_in(two)[0] is None


def test_a_place_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    assert found_in(tmp_path / "nowhere") == (None, [])


def test_drafts_and_other_folders_are_no_checkpoints(two: Path) -> None:
    (two / ".staging-step-00000003-aaaa").mkdir()
    (two / "notes").mkdir()
    assert list_checkpoints(open_storage(str(two))) == [SECOND, FIRST]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_interval_can_be_read_whoever_wrote_it(tmp_path: Path, world_size: int) -> None:
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


def test_only_the_bytes_that_are_needed_are_read(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert len({path for path, _ in asked}) == 2  # it lies across both ranks' parts


def test_the_parts_are_safetensors_files_like_any_other(two: Path) -> None:
    for rank in (0, 1):
        tensors = load_file(part_of(two / SECOND, rank))
        intervals = {interval.key: interval for interval in layout_of(rank, 2).intervals}
        assert set(tensors) == set(intervals)
        for key, tensor in tensors.items():
            assert np.array_equal(tensor, values(intervals[key], step=2))


def test_the_manifest_says_where_each_interval_begins(two: Path) -> None:
    body = json.loads((two / SECOND / "manifest.json").read_text())
    for part in body["parts"]:
        content = (two / SECOND / part["name"]).read_bytes()
        offset = part["data_start"]
        for kind, name, start, stop, dtype in part["intervals"]:
            interval = Interval(kind=kind, name=name, start=start, stop=stop, dtype=dtype)
            assert content[offset : offset + interval.size_bytes] == values(interval, step=2).tobytes()
            offset += interval.size_bytes
        assert offset == len(content)


def test_a_checkpoint_of_another_model_is_refused_with_the_parameters_that_differ(two: Path) -> None:
    checkpoint = open_checkpoint(open_storage(str(two)), SECOND)
    other = model_shape(**{"norm.weight": (8,), "head/odd name.weight": None, "bias": (3,)})
    with pytest.raises(CheckpointError) as refused:
        checkpoint.require_job(config_digest="recipe", corpus="corpus", shape=other)
    for said in (
        "another model",
        "it has no bias",
        "head/odd name.weight, which this model has not",
        "7 there and 8 here",
    ):
        assert said in str(refused.value)


@pytest.mark.parametrize(("changed", "said"), [("config_digest", "another job"), ("corpus", "another corpus")])
def test_a_checkpoint_of_another_recipe_or_corpus_is_refused(two: Path, changed: str, said: str) -> None:
    checkpoint = open_checkpoint(open_storage(str(two)), SECOND)
    own = {"config_digest": "recipe", "corpus": "corpus"} | {changed: "other"}
    with pytest.raises(CheckpointError, match=said):
        checkpoint.require_job(**own, shape=model_shape())


def test_what_is_not_there_is_said_with_its_numbers(two: Path) -> None:
    checkpoint = open_checkpoint(open_storage(str(two)), SECOND)
    wanted = Interval(kind="master", name="norm.weight", start=0, stop=9, dtype="F32")
    with pytest.raises(CheckpointError, match=r"holds 7 of the 9 elements 0\.\.9 of norm.weight \(master\)"):
        checkpoint.read([(wanted, memoryview(bytearray(36)))])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_are_kept_as_asked_for(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        write(str(tmp_path), step, keep=keep)
    assert list_checkpoints(open_storage(str(tmp_path))) == [f"step-{step:08d}" for step in range(5, 5 - keep, -1)]


def test_a_broken_checkpoint_is_not_counted_among_those_that_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(str(tmp_path), step, keep=2)
    part_of(tmp_path / "step-00000003").unlink()
    write(str(tmp_path), 4, keep=2)
    storage = open_storage(str(tmp_path))
    whole = [name for name in list_checkpoints(storage) if verify_checkpoint(storage, name) is None]
    assert whole == ["step-00000004", "step-00000002"]


def test_newer_ones_that_are_whole_are_never_removed(tmp_path: Path) -> None:
    for step in (7, 8, 9):
        write(str(tmp_path), step)
    write(str(tmp_path), 3, keep=1)  # a run that was sent back to an earlier step
    assert set(list_checkpoints(open_storage(str(tmp_path)))) >= {f"step-{step:08d}" for step in (3, 9)}


def test_two_writers_of_one_step_leave_one_that_verifies(tmp_path: Path) -> None:
    write(str(tmp_path), 1)
    before = (tmp_path / FIRST / "manifest.json").read_bytes()
    write(str(tmp_path), 1, world_size=3, token="bbbbbbbb0001")
    assert found_in(tmp_path) == (FIRST, [])
    assert (tmp_path / FIRST / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FIRST]


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(str(tmp_path), 1)
    part_of(tmp_path / FIRST).unlink()
    write(str(tmp_path), 1, token="bbbbbbbb0001")
    assert found_in(tmp_path) == (FIRST, [])


def test_another_jobs_checkpoint_is_not_touched_and_the_writer_refused(tmp_path: Path) -> None:
    write(str(tmp_path), 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / FIRST).iterdir()}
    state = state_bytes(progress(1, config_digest="other"), model_shape()).decode()
    with pytest.raises(CheckpointError, match="a checkpoint of another job that writes to the same folder"):
        write(str(tmp_path), 1, token="bbbbbbbb0001", state=state)
    assert {path.name: path.read_bytes() for path in (tmp_path / FIRST).iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [FIRST]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that holds one checkpoint and takes no more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    write(str(folder), 1)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder_is_said_and_can_still_be_read(read_only: Path) -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        write(str(read_only), 2)
    assert found_in(read_only) == (FIRST, [])


def test_a_checkpoint_can_be_copied_anywhere(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / SECOND, tmp_path / "elsewhere" / SECOND)
    assert found_in(tmp_path / "elsewhere") == (SECOND, [])


def test_nothing_in_a_checkpoint_is_a_pickle(two: Path) -> None:
    for path in (two / SECOND).iterdir():
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())
