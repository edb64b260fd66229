"""Sends one rank's snapshots to the peer node, straight from shared memory (`sendfile`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from forge.checkpoint.snapshot_buffer import SnapshotBuffer
from forge.elastic.rpc import Channel, Endpoint, connect

_RETRY_S = 0.1


class Replicator:
    """Replicates the snapshots of one rank; if the peer cannot keep up, only the newest one is sent."""

    def __init__(
        self,
        peer: Endpoint | None,
        snapshot: SnapshotBuffer,
        *,
        name: dict[str, int],
        secret: bytes,
        on_replicated: Callable[[int], None],
    ) -> None:
        """Args: peer: the replica store of another node; None if there is no other node. name: generation, rank
        and world size. on_replicated: called with each step that is complete on the peer, or that cannot be
        replicated because there
            is no peer.
        """
        self._snapshot = snapshot
        self._name, self._secret, self._on_replicated = name, secret, on_replicated
        self._pending: tuple[int, int] | None = None
        """The newest step, and its slot in the buffer."""
        self._wakeup = asyncio.Event()
        self._task = asyncio.ensure_future(self._send_forever(peer)) if peer else None

    def send(self, *, step: int, slot: int) -> None:
        """Replicate a slot of the buffer, which holds a complete snapshot."""
        self._pending = (step, slot)
        self._wakeup.set()
        if self._task is None:
            self._on_replicated(step)

    def set_peer(self, peer: Endpoint | None) -> None:
        """Replace the peer, and send the newest snapshot to the new one, if there is one."""
        self.close()
        self._task = asyncio.ensure_future(self._send_forever(peer)) if peer else None
        if self._pending is not None:
            self.send(step=self._pending[0], slot=self._pending[1])

    def close(self) -> None:
        """Stop replicating."""
        if self._task is not None:
            self._task.cancel()

    async def _send_forever(self, peer: Endpoint) -> None:
        channel: Channel | None = None
        try:
            while True:
                await self._wakeup.wait()
                self._wakeup.clear()
                pending = self._pending
                if pending is None:
                    continue
                try:
                    is_new = channel is None
                    channel = channel or await connect(peer, secret=self._secret)
                    await self._send(channel, *pending, is_new=is_new)
                    self._on_replicated(pending[0])
                except (OSError, EOFError, ValueError):  # repeated until the supervisor sets another peer
                    if channel is not None:
                        channel.close()
                    channel = None
                    await asyncio.sleep(_RETRY_S)
                    self._wakeup.set()
        finally:
            if channel is not None:
                channel.close()

    async def _send(self, channel: Channel, step: int, slot: int, *, is_new: bool) -> None:
        copies = self._snapshot.snapshots()
        snapshot = next((copy for copy in copies if (copy.step, copy.slot) == (step, slot)), None)
        if snapshot is None:
            return
        message = {
            "request": "replicate",
            "step": step,
            "state": snapshot.state,
            "checksum": snapshot.checksum,
            "description": self._snapshot.description.decode() if is_new else None,
        }
        await channel.send(message | self._name)
        num_bytes = self._snapshot.layout.size_bytes
        await channel.send_file(self._snapshot.fd, offset=self._snapshot.data_offset(slot), count=num_bytes)
        await channel.receive()
