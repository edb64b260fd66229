"""Folders and buckets give the same guarantees; the bucket is S3, served by moto on loopback."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from forge.checkpoint import storage_fs as folder_module
from forge.checkpoint import storage_object as bucket_module
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import Storage, open_storage
from forge.checkpoint.verify import find_checkpoint, verify_checkpoint
from forge.errors import CheckpointError
from tests.support.bucket import Bucket, serve_bucket
from tests.support.checkpoints import layout_of, model_shape, progress, state_bytes, values, write


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with serve_bucket() as served:
        yield served


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage of each kind."""
    if request.param == "folder":
        return str(tmp_path / "place")
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    served: Bucket = request.getfixturevalue("bucket")
    return f"{served.url}/{tmp_path.name}"


def staging_in(storage: Storage, name: str = "step-00000001", token: str = "aaaaaaaa0001") -> str:
    return storage.open_staging(name, token=token)


def test_write__file__is_read_back_completely_and_in_ranges(url: str) -> None:
    storage = open_storage(url)
    content = random.Random(0).randbytes(300_000)
    staging = staging_in(storage)
    storage.write(f"{staging}/file", lambda: [content[:1000], memoryview(content)[1000:]])
    assert storage.files(staging) == {"file": len(content)}
    assert storage.read(f"{staging}/file") == content
    assert storage.crc32(f"{staging}/file") == zlib.crc32(content)
    rng = random.Random(1)
    ranges = []
    for _ in range(50):
        start = rng.randrange(len(content))
        ranges.append((start, memoryview(bytearray(rng.randint(0, len(content) - start)))))
    storage.read_into(f"{staging}/file", ranges)
    for start, view in ranges:
        assert bytes(view) == content[start : start + len(view)]


def test_read_into__large_range__is_split(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "_REQUEST_BYTES", 1000)
    monkeypatch.setattr(bucket_module, "_BATCH_BYTES", 5000)
    storage = open_storage(url)
    content = random.Random(0).randbytes(30_001)
    staging = staging_in(storage)
    storage.write(f"{staging}/file", lambda: [content])
    view = memoryview(bytearray(len(content)))
    storage.read_into(f"{staging}/file", [(0, view)])
    assert bytes(view) == content
    assert storage.crc32(f"{staging}/file") == zlib.crc32(content)


@pytest.mark.parametrize("first", [0, 100, 4096])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_write__large_chunks__any_alignment_and_offset(url: str, first: int, is_aligned: bool) -> None:
    content = random.Random(0).randbytes(3 * 2**20 + 123)
    memory = mmap.mmap(-1, len(content) + 64)
    view = memoryview(memory)[0 if is_aligned else 64 :][: len(content)]
    view[:] = content
    storage = open_storage(url)
    staging = staging_in(storage)
    head, middle = bytes(first), 2 * 2**20
    storage.write(f"{staging}/file", lambda: [head, view[:middle], view[middle:]])
    assert storage.read(f"{staging}/file") == head + content
    storage.write(f"{staging}/file", lambda: [content[:5]])
    assert storage.read(f"{staging}/file") == content[:5]


def test_read__beyond_end_or_missing_file__different_errors(url: str) -> None:
    storage = open_storage(url)
    staging = staging_in(storage)
    storage.write(f"{staging}/file", lambda: [b"abc"])
    with pytest.raises(EOFError):
        storage.read_into(f"{staging}/file", [(0, memoryview(bytearray(4)))])
    with pytest.raises(FileNotFoundError):
        storage.read(f"{staging}/other")


def test_publish__is_atomic_and_refuses_existing_name(url: str) -> None:
    storage = open_storage(url)
    staging = staging_in(storage)
    storage.write(f"{staging}/part", lambda: [b"abc"])
    assert "manifest.json" not in storage.files("step-00000001")
    storage.publish(staging, "step-00000001", last=("manifest.json", b"{}"))
    assert storage.names() == ["step-00000001"]
    assert storage.files("step-00000001") == {"part": 3, "manifest.json": 2}
    again = staging_in(storage, token="bbbbbbbb0001")
    storage.write(f"{again}/part-bbbbbbbb0001", lambda: [b"abcd"])
    with pytest.raises(FileExistsError):
        storage.publish(again, "step-00000001", last=("manifest.json", b"{}"))
    storage.discard(again, token="bbbbbbbb0001")
    assert storage.files("step-00000001") == {"part": 3, "manifest.json": 2}
    storage.remove("step-00000001")
    assert storage.files("step-00000001") == {}
    storage.remove("step-00000001")


@pytest.mark.parametrize("world_size", [1, 3])
def test_storage__save_find_read_prune__any_storage(url: str, world_size: int) -> None:
    for step in (1, 2, 3):
        write(url, step, world_size=world_size, keep=2)
    storage = open_storage(url)
    assert list_checkpoints(storage) == ["step-00000003", "step-00000002"]
    found = find_checkpoint(storage, on_skip=lambda *_: None)
    assert found is not None
    assert found.progress == progress(3)
    for interval in layout_of(0, 1).intervals:
        content = bytearray(interval.size_bytes)
        found.read([(interval, memoryview(content))])
        assert np.array_equal(np.frombuffer(content, "<f4"), values(interval, step=3))


def spoil_part(storage: Storage, name: str) -> None:
    part = next(file for file in storage.files(name) if file.endswith(".safetensors"))
    content = storage.read(f"{name}/{part}")
    storage.write(f"{name}/{part}", lambda: [content[:-1] + bytes([content[-1] ^ 1])])


def test_storage__broken_checkpoint__is_skipped_and_replaced(url: str) -> None:
    write(url, 1)
    write(url, 2)
    storage = open_storage(url)
    spoil_part(storage, "step-00000002")
    skipped: list[str] = []
    found = find_checkpoint(storage, on_skip=lambda name, why: skipped.append(f"{name} {why}"))
    assert found is not None
    assert found.name == "step-00000001"
    assert len(skipped) == 1
    assert "does not match its checksum" in skipped[0]
    write(url, 2, token="bbbbbbbb0001")  # the run reaches this step again
    assert verify_checkpoint(storage, "step-00000002") is None


def test_storage__checkpoint_of_another_job__is_kept(url: str) -> None:
    write(url, 1)
    state = state_bytes(progress(1, config_digest="other"), model_shape()).decode()
    with pytest.raises(CheckpointError, match="another job"):
        write(url, 1, token="bbbbbbbb0001", state=state)
    storage = open_storage(url)
    assert verify_checkpoint(storage, "step-00000001") is None
    assert open_checkpoint(storage, "step-00000001").progress.config_digest == "recipe"


def test_storage__second_save_of_a_step__leaves_no_files(url: str) -> None:
    write(url, 1)
    before = open_storage(url).files("step-00000001")
    write(url, 1, world_size=3, token="bbbbbbbb0001")
    assert open_storage(url).files("step-00000001") == before


@pytest.mark.slow
def test_bucket__temporary_failure__is_retried(bucket: Bucket, tmp_path: Path) -> None:
    url = f"{bucket.url}/{tmp_path.name}"
    write(url, 1)
    before = bucket.num_failures
    bucket.fail_for(3.0)
    write(url, 2)
    assert bucket.num_failures > before
    assert verify_checkpoint(open_storage(url), "step-00000002") is None


@pytest.mark.slow
def test_bucket__permanent_failure__is_reported_after_patience(bucket: Bucket, tmp_path: Path) -> None:
    storage = open_storage(f"{bucket.url}/{tmp_path.name}", patience_s=1.0)
    bucket.fail_for(60.0)
    try:
        with pytest.raises(CheckpointError, match=r"s3://.*cannot be listed.*internal error"):
            list_checkpoints(storage)
    finally:
        bucket.fail_for(0.0)


def test_bucket__missing__is_named(bucket: Bucket) -> None:
    storage = open_storage("s3://no-such-bucket/runs", patience_s=1.0)
    with pytest.raises((CheckpointError, OSError), match="bucket"):
        storage.write("step-00000001/file", lambda: [b"x"])


@pytest.mark.parametrize("url", ["nonsense://place/runs", "gs://bucket/runs", "abfs://container/runs"])
def test_open_storage__missing_package__error_names_the_extra(url: str) -> None:
    with pytest.raises(CheckpointError, match=url.partition(":")[0]) as refused:
        open_storage(url)
    if not url.startswith("nonsense"):
        assert "forge-train[" in str(refused.value)


def test_sweep__folder__removes_staging_of_dead_writers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_LOCK_GRACE_S", 0.0)
    code = (
        "import sys, time; from forge.checkpoint.storage import open_storage; s = open_storage(sys.argv[1]);"
        "s.open_staging('step-00000001', token='cccccccc0001'); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"held\n"
        storage = open_storage(str(tmp_path))
        storage.sweep(own="aaaaaaaa", up_to="aaaaaaaa0001")
        assert list(tmp_path.glob(".staging-*"))
        writer.kill()
    time.sleep(0.05)
    storage.sweep(own="aaaaaaaa", up_to="aaaaaaaa0001")
    assert not list(tmp_path.glob(".staging-*"))


def test_sweep__writer_that_has_written_its_part__keeps_it_until_the_writer_opens_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_LOCK_GRACE_S", 0.0)
    of_rank_1, of_other_job = open_storage(str(tmp_path)), open_storage(str(tmp_path))
    first = of_rank_1.open_staging("step-00000001", token="cccccccc0001")
    of_rank_1.write(f"{first}/part", lambda: [b"abc"])  # the writer of rank 0 has not started yet
    time.sleep(0.02)
    of_other_job.sweep(own="aaaaaaaa", up_to="aaaaaaaa0001")
    assert of_rank_1.files(first) == {"part": 3}
    second = of_rank_1.open_staging("step-00000002", token="cccccccc0002")
    of_other_job.sweep(own="aaaaaaaa", up_to="aaaaaaaa0001")
    assert [path.name for path in tmp_path.iterdir()] == [second]


def test_sweep__own_staging__removes_up_to_token_only(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for count in (1, 2, 3):
        staging = tmp_path / storage.open_staging("step-00000009", token=f"aaaaaaaa{count:04x}")
        os.utime(staging, (0, 0))  # old: a fast peer may wait long for a slow one
    storage.sweep(own="aaaaaaaa", up_to="aaaaaaaa0002")
    assert [path.name for path in tmp_path.iterdir()] == [".staging-step-00000009-aaaaaaaa0003"]


def test_sweep__bucket__removes_abandoned_after_a_day(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "://" not in url:
        pytest.skip("a folder has locks")
    storage = open_storage(url)
    write(url, 1)
    storage.write("step-00000002/part-aaaaaaaa0002", lambda: [b"abc"])
    storage.sweep(own="bbbbbbbb", up_to="bbbbbbbb0001")
    assert storage.files("step-00000002")
    monkeypatch.setattr(bucket_module, "_ABANDONED_AFTER_S", -1.0)
    storage.sweep(own="bbbbbbbb", up_to="bbbbbbbb0001")
    assert storage.files("step-00000002") == {}
    assert verify_checkpoint(storage, "step-00000001") is None
