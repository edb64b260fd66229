"""What is done on GPUs only, on a machine without one: the order of streams with a fake CUDA, settings, errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from forge.errors import UserCodeError
from forge.train import cuda
from forge.train.snapshotter import Snapshotter
from tests.support.checkpoints import progress
from tests.train.test_snapshotter import LARGE_BYTES, Weights


class FakeCuda:
    """torch.cuda's streams and events and its runtime; records what is done in which stream."""

    def __init__(self, *, lock_code: int = 0) -> None:
        self.done: list[str] = []
        self.locked: set[int] = set()
        self.current = FakeStream(self, "train")
        self._lock_code, self._clock_ms = lock_code, 0.0

    def Stream(self, *, device: torch.device) -> FakeStream:
        assert device == torch.device("cuda:1"), "otherwise the stream is of the first GPU"
        return FakeStream(self, "copy")

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    def Event(self, *, enable_timing: bool) -> FakeEvent:
        return FakeEvent("timing")

    def tick(self) -> float:
        self._clock_ms += 250
        return self._clock_ms

    # --- CUDA's runtime

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.done.append(f"lock {size} bytes")
        if self._lock_code == 0:
            self.locked.add(address)
        return self._lock_code

    def cudaHostUnregister(self, address: int) -> int:
        self.locked.remove(address)
        return 0


class FakeEvent:
    def __init__(self, name: str) -> None:
        self.name, self.at_ms = name, 0.0

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


class FakeStream:
    def __init__(self, api: FakeCuda, name: str) -> None:
        self._api, self._name = api, name

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(f"{self._name} so far")
        event.at_ms = self._api.tick()
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self._api.done.append(f"{self._name} waits for {event.name}")

    def synchronize(self) -> None:
        self._api.done.append(f"host waits for {self._name}")


class GpuWeights(Weights):
    """A state that says that it is on the second GPU."""

    device = torch.device("cuda:1")

    def __init__(self, api: FakeCuda) -> None:
        super().__init__(LARGE_BYTES)
        self._api = api

    def copy_to(self, memory: memoryview, *, part: Any, buffers: bool) -> None:
        self._api.done.append(f"copy {'buffers' if buffers else 'the rest'}")
        super().copy_to(memory, part=part, buffers=buffers)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeCuda:
    api = FakeCuda(lock_code=getattr(request, "param", 0))
    monkeypatch.setattr(torch, "get_device_module", lambda device: api)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: api)
    return api


def test_snapshot__on_a_gpu__update_waits_for_the_copy_and_the_host_does_not(fake: FakeCuda) -> None:
    snapshotter = Snapshotter(GpuWeights(fake))  # type: ignore[arg-type]
    size = snapshotter.buffer.layout.size_bytes
    pending = snapshotter.begin(progress(1))
    snapshotter.settle()
    snapshotter.join()
    snapshotter.settle()  # nothing to wait for any more
    assert [done for done in fake.done if not done.startswith(("host", "train"))] == [
        "copy buffers",
        f"lock {size} bytes",
        "copy waits for train so far",
        "copy the rest",
    ]
    assert fake.done.count("train waits for copy so far") == 1
    assert fake.done.index("copy the rest") < fake.done.index("host waits for copy")
    assert [found.step for found in snapshotter.buffer.snapshots()] == [1] and pending.failure is None
    snapshotter.close()


def test_snapshot__update_held_back_on_the_gpu__counts_as_its_cost(fake: FakeCuda) -> None:
    snapshotter = Snapshotter(GpuWeights(fake))  # type: ignore[arg-type]
    snapshotter.begin(progress(1))
    snapshotter.settle()
    snapshotter.join()
    held_s = 0.25
    assert held_s <= snapshotter.take_cost_s() < held_s + 5  # and what the host waited
    assert snapshotter.take_cost_s() == 0
    snapshotter.close()


def test_snapshot__slot_used_again__locked_once_and_unlocked_at_the_end(fake: FakeCuda) -> None:
    snapshotter = Snapshotter(GpuWeights(fake))  # type: ignore[arg-type]
    for step in (1, 2, 3):
        snapshotter.begin(progress(step))
        snapshotter.settle()
        snapshotter.finish()
    assert sum(done.startswith("lock") for done in fake.done) == len(fake.locked) == 1
    snapshotter.close()
    assert not fake.locked


@pytest.mark.parametrize("fake", [2], indirect=True)
def test_snapshot__memory_cannot_be_page_locked__copied_without_and_said_once(
    fake: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshotter = Snapshotter(GpuWeights(fake))  # type: ignore[arg-type]
    for step in (1, 2):
        snapshotter.begin(progress(step))
        snapshotter.settle()
        snapshotter.finish()
    assert [found.step for found in snapshotter.buffer.snapshots()] == [2]
    assert capsys.readouterr().err.count("CUDA error 2; copying without") == 1
    snapshotter.close()


def test_visible_gpus__of_a_run__numbered_in_the_order_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    cuda.set_visible_gpus(["3", "1"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1"


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "=eth1"), ({"NCCL_SOCKET_IFNAME": "ib0"}, "ib0")], ids=["unset", "set by the user"]
)
def test_nccl__interface_of_the_node__used_unless_set(
    own: Mapping[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(own))
    cuda.set_up_nccl(interface="eth1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == expected
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


def test_fork_server__code_that_has_used_cuda__refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.require_unused_cuda("the code")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserCodeError, match="the code uses CUDA when it is imported"):
        cuda.require_unused_cuda("the code")


def test_inputs__to_the_cpu__not_copied() -> None:
    tokens = torch.arange(4)
    assert cuda.move_to(torch.device("cpu"), {"tokens": tokens})["tokens"] is tokens
