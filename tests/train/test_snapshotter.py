"""Snapshots during training: the newest complete one is never overwritten, and at most one interval can be lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forge.checkpoint.intervals import Interval, pack
from forge.checkpoint.snapshot_buffer import NUM_SLOTS, Snapshot, SnapshotBuffer
from forge.train.snapshotter import PendingSnapshot, Snapshotter
from forge.train.state import SavedPart
from tests.support.checkpoints import model_shape, progress

SMALL_BYTES = 64
LARGE_BYTES = 8 * 2**20
"""Large enough to be copied by a thread."""
_TIMEOUT_S = 10


class Weights:
    """A state of a single value, with the interface of `TrainState`."""

    device = torch.device("cpu")

    def __init__(self, size_bytes: int = SMALL_BYTES) -> None:
        flag = Interval(kind="buffer", name="flag", start=0, stop=1, dtype="U8")
        weight = Interval(kind="master", name="w", start=0, stop=size_bytes // 4, dtype="F32")
        self._part, self.shape = SavedPart(layout=pack([flag, weight]), sources=()), model_shape()
        self.rank, self.num_groups, self.shard_group_size = 0, 1, 1
        self.value = 0
        self.is_broken = False
        self.may_continue = threading.Event()
        self.may_continue.set()

    def part(self, number: int, *, of: int, has_buffers: bool) -> SavedPart:
        return self._part

    def copy_to(self, memory: memoryview, *, part: Any, buffers: bool) -> None:
        if buffers:
            memory[-1:] = bytes([self.value])
            return
        assert self.may_continue.wait(_TIMEOUT_S)
        if self.is_broken:
            raise RuntimeError("no memory")
        memory[:-1] = bytes([self.value]) * (len(memory) - 1)


class Agent:
    """A replica client that replicates at once, or when allowed to."""

    def __init__(self) -> None:
        self.registered: SnapshotBuffer | None = None
        self.calls: list[tuple[str, int]] = []
        self.is_asked = threading.Event()
        self.may_continue = threading.Event()
        self.may_continue.set()
        self.worked_s = 0.0

    def register(self, snapshot: SnapshotBuffer, *, piece: int, num_pieces: int, is_sent: bool) -> None:
        assert (piece, num_pieces, is_sent) == (0, 1, True)
        self.registered = snapshot

    def metadata(self) -> Mapping[str, Any]:
        return {"metrics": [1, 2]}

    def publish(self, *, step: int, slot: int) -> None:
        self.calls.append(("published", step))

    def wait_replicated(self, step: int) -> None:
        assert ("published", step) in self.calls, "a snapshot is replicated only after it is published"
        self.is_asked.set()
        assert self.may_continue.wait(_TIMEOUT_S)
        self.calls.append(("replicated", step))

    def cpu_s(self) -> float:
        return self.worked_s


@contextmanager
def copying(state: Weights, agent: Agent | None) -> Iterator[Snapshotter]:
    snapshotter = Snapshotter(state, replica_client=agent)  # type: ignore[arg-type]
    try:
        yield snapshotter
    finally:
        state.may_continue.set()
        snapshotter.close()


def begin(snapshotter: Snapshotter, state: Weights, step: int, *, is_pinned: bool = False) -> PendingSnapshot:
    """Set the state to a value derived from the step, and begin a snapshot."""
    state.value = step % 251
    return snapshotter.begin(progress(step), is_pinned=is_pinned)


def whole(snapshotter: Snapshotter) -> dict[int, Snapshot]:
    """Return the complete snapshots by step, after checking their bytes."""
    found = {}
    for copy in snapshotter.buffer.snapshots():
        with snapshotter.buffer.data(copy.slot) as data:
            assert bytes(data) == bytes([copy.step % 251]) * len(data)
        assert snapshotter.buffer.is_intact(copy)
        found[copy.step] = copy
    return found


@pytest.mark.parametrize("size_bytes", [SMALL_BYTES, LARGE_BYTES])
def test_snapshot__state_changed_afterwards__is_unaffected(size_bytes: int) -> None:
    state, agent = Weights(size_bytes), Agent()
    with copying(state, agent) as snapshotter:
        assert agent.registered is snapshotter.buffer
        begin(snapshotter, state, 7)
        snapshotter.settle()
        state.value = 99
        snapshotter.finish()
        (copy,) = whole(snapshotter).values()
        assert copy.state == {"progress": asdict(progress(7)), "metrics": [1, 2]}
        assert agent.calls == [("published", 7), ("replicated", 7)]


def test_begin__buffers__are_copied_at_once() -> None:
    state = Weights(LARGE_BYTES)
    with copying(state, Agent()) as snapshotter:
        state.may_continue.clear()
        begun = begin(snapshotter, state, 7)
        with snapshotter.buffer.data(begun.slot) as data:
            assert data[-1] == 7
        assert not begun.is_copied.is_set()


def test_settle__waits_for_copy_not_for_replication() -> None:
    state, agent = Weights(LARGE_BYTES), Agent()
    with copying(state, agent) as snapshotter:
        agent.may_continue.clear()
        state.may_continue.clear()
        begun = begin(snapshotter, state, 1)
        thread = threading.Thread(target=snapshotter.settle)
        thread.start()
        assert not begun.is_copied.is_set()
        state.may_continue.set()
        thread.join(_TIMEOUT_S)
        assert begun.is_copied.is_set()
        assert not agent.is_asked.is_set()


def test_complete__copy_runs__waits_and_counts_as_cost() -> None:
    state, agent = Weights(LARGE_BYTES), Agent()
    with copying(state, agent) as snapshotter:
        snapshotter.complete()  # before the first snapshot
        state.may_continue.clear()
        begun = begin(snapshotter, state, 1)
        timer = threading.Timer(0.02, state.may_continue.set)
        timer.start()
        snapshotter.complete()
        assert list(whole(snapshotter)) == [1]
        assert agent.calls == [("published", 1)]
        assert begun.stall_s > 0.005


def test_begin__previous_not_replicated__waits() -> None:
    state, agent = Weights(), Agent()
    with copying(state, agent) as snapshotter:
        begin(snapshotter, state, 1)
        agent.may_continue.clear()
        second = threading.Thread(target=begin, args=(snapshotter, state, 2))
        second.start()
        assert agent.is_asked.wait(_TIMEOUT_S)
        assert ("published", 2) not in agent.calls
        assert list(whole(snapshotter)) == [1]
        agent.may_continue.set()
        second.join(_TIMEOUT_S)
        assert agent.calls == [("published", 1), ("replicated", 1), ("published", 2)]


def test_begin__during_copy__previous_snapshot_is_complete() -> None:
    state = Weights(LARGE_BYTES)
    with copying(state, Agent()) as snapshotter:
        for step in range(1, 6):
            state.may_continue.clear()
            begin(snapshotter, state, step)
            assert max(whole(snapshotter), default=0) == step - 1
            state.may_continue.set()
            snapshotter.join()
            assert max(whole(snapshotter)) == step


@given(actions=st.lists(st.sampled_from(["copy", "save", "saved"]), max_size=25))
def test_begin__newest_and_pinned_slots__are_not_reused(actions: list[str]) -> None:
    state = Weights()
    pinned: dict[int, int] = {}
    with copying(state, Agent()) as snapshotter:
        for step, action in enumerate(actions, start=1):
            if action == "saved" and pinned:
                snapshotter.unpin(pinned.pop(min(pinned)))
            elif action != "saved" and len(pinned) < NUM_SLOTS - 1:  # the loop has at most this many pending
                newest = max(whole(snapshotter).values(), key=lambda copy: copy.step, default=None)
                begun = begin(snapshotter, state, step, is_pinned=action == "save")
                assert begun.slot not in pinned.values()
                assert newest is None or begun.slot != newest.slot
                if action == "save":
                    pinned[step] = begun.slot
            assert pinned.keys() <= whole(snapshotter).keys()


@pytest.mark.parametrize("size_bytes", [SMALL_BYTES, LARGE_BYTES])
def test_begin__copy_fails__is_reported_and_next_succeeds(size_bytes: int) -> None:
    state, agent = Weights(size_bytes), Agent()
    failures: list[str | None] = []
    with copying(state, agent) as snapshotter:
        begin(snapshotter, state, 1)
        snapshotter.finish()
        state.is_broken = True
        state.value = 2
        snapshotter.begin(progress(2), on_done=lambda failed: failures.append(failed.failure))
        snapshotter.finish()
        assert failures == ["the state could not be copied: no memory"]
        assert list(whole(snapshotter)) == [1]
        state.is_broken = False
        begin(snapshotter, state, 3)
        snapshotter.finish()
        assert max(whole(snapshotter)) == 3
        assert {step for call, step in agent.calls if call == "replicated"} == {1, 3}


def test_begin__no_replica_client__uses_one_slot() -> None:
    state = Weights(LARGE_BYTES)
    with copying(state, None) as snapshotter:
        assert {begin(snapshotter, state, step).slot for step in range(1, 5)} == {0}
        snapshotter.join()
        assert list(whole(snapshotter)) == [4]


def test_take_cost__stall_and_cpu_time__is_returned_once() -> None:
    state, agent = Weights(), Agent()
    with copying(state, agent) as snapshotter:
        begun = begin(snapshotter, state, 1)
        agent.worked_s += 100.0
        assert snapshotter.take_cost_s() == pytest.approx(100.0 + begun.stall_s)
        assert snapshotter.take_cost_s() == 0.0
