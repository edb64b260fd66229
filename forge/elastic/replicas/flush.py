"""A durable checkpoint out of the store, when no ranks are there to order it.

The same saver process that writes a rank's part while it trains is started on a snapshot that outlived its
rank; the first rank's saver waits for the others and seals the checkpoint, as ever.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

from forge.checkpoint.manifest import Progress, shape_from_record, state_bytes
from forge.checkpoint.snapshot_buffer import SnapshotBuffer
from forge.checkpoint.writer_process import WriteCommand


async def flush_shard(
    snapshot: SnapshotBuffer, *, step: int, rank: int, world_size: int, url: str, keep: int, token: str
) -> int | None:
    """Write one rank's part of a checkpoint, and on the first rank's behalf seal it.

    Returns: the bytes of the whole checkpoint if this part's writer has sealed it; None for the others, and
        where it could not be written: the saver has said why in the agent's log.
    """
    copy = next((copy for copy in snapshot.copies() if copy.step == step), None)
    if copy is None:
        return None
    progress, shape = Progress(**copy.state["progress"]), shape_from_record(snapshot.about["shape"])
    order = WriteCommand(
        url=url,
        step=step,
        slot=copy.slot,
        rank=rank,
        world_size=world_size,
        token=token,
        keep=keep,
        state=state_bytes(progress, shape, unacked_metrics=copy.state.get("metrics", ())).decode()
        if rank == 0
        else "",
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forge.checkpoint.writer_process", str(snapshot.fd)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=[snapshot.fd],
    )
    answer, _ = await process.communicate(json.dumps(asdict(order)).encode() + b"\n")
    outcomes = [json.loads(line) for line in answer.splitlines()]
    return next((outcome["sealed"] for outcome in outcomes if "sealed" in outcome), None)
