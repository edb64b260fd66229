"""Copy the state of a rank from its device to the slots of its snapshot buffer.

On a GPU the copy runs in a stream of its own, to page-locked memory: neither the host nor the next forward and
backward passes wait for it, and the GPU holds the next update back until the copy is complete. The slots themselves
are page-locked (`cudaHostRegister`), so no second copy of the state is needed. On CPU the same calls of `torch.cpu`
have no effect, and the copy is complete when `copy` returns.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from forge.checkpoint.snapshot_buffer import SnapshotBuffer
from forge.train.state import SavedPart, TrainState

_PORTABLE = 1
"""Page-locked for all CUDA contexts. Source: CUDA Runtime API, `cudaHostRegisterPortable`."""


class SnapshotCopier:
    """Copies a part of the state of one rank; used by one thread at a time."""

    def __init__(self, state: TrainState, buffer: SnapshotBuffer, *, part: SavedPart) -> None:
        self._state, self._buffer, self._part = state, buffer, part
        self._on_gpu = state.device.type == "cuda"
        self._api: Any = torch.get_device_module(state.device)
        self._stream = self._api.Stream(device=state.device) if self._on_gpu else self._api.Stream()
        self._copied: Any = None
        self._holds: list[tuple[Any, Any]] = []
        self._locked: dict[int, int] = {}
        """Slot → address of its page-locked memory."""
        self._can_lock = self._on_gpu

    def begin(self, slot: int) -> Any:
        """Copy the buffers, which a forward pass may change. Returns: a CUDA event, for `copy`."""
        self._state.copy_to(self._buffer.begin(slot), part=self._part, buffers=True)
        return self._api.current_stream(self._state.device).record_event()

    def copy(self, slot: int, *, after: Any) -> None:
        """Copy everything else; on a GPU the copy is only queued when this returns. On any thread.

        Args:
            after: what `begin` returned.
        """
        self._buffer.prepare(slot)
        data = self._buffer.data(slot)
        if self._can_lock and slot not in self._locked:
            self._lock(slot, data)
        self._stream.wait_event(after)
        with self._api.stream(self._stream):
            self._state.copy_to(data, part=self._part, buffers=False)
        self._copied = self._stream.record_event()

    def wait(self) -> None:
        """Wait until the last copy is complete."""
        if self._on_gpu:
            self._stream.synchronize()

    def hold_update(self) -> None:
        """Have the GPU run what is queued from here on after the last copy; call it when that has been queued."""
        copied, self._copied = self._copied, None
        if copied is None:
            return
        stream = self._api.current_stream(self._state.device)
        before, after = (self._api.Event(enable_timing=True) for _ in range(2))
        stream.record_event(before)
        stream.wait_event(copied)
        stream.record_event(after)
        self._holds.append((before, after))

    def take_held_s(self) -> float:
        """Return how long the GPU has been held back since the last call, in seconds, as far as that is over."""
        over = [(before, after) for before, after in self._holds if after.query()]
        self._holds = self._holds[len(over) :]
        return float(sum(before.elapsed_time(after) for before, after in over)) / 1000

    def close(self) -> None:
        """Unlock the memory, before the buffer is closed."""
        self.wait()
        for address in self._locked.values():
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._locked.clear()

    def _lock(self, slot: int, data: memoryview) -> None:
        """Page-lock a slot; if that fails, copies go through the driver's own page-locked memory, more slowly."""
        address = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, len(data), _PORTABLE))  # type: ignore[no-untyped-call]
        if code == 0:
            self._locked[slot] = address
            return
        self._can_lock = False
        sys.stderr.write(
            f"snapshots: page-locking {len(data)} bytes failed with CUDA error {code}; copying without\n"
        )
