"""Writes a checkpoint from the replica store while no ranks run.

It starts the same writer process as during training, on a snapshot that outlived its rank. Rank 0's writer waits
for the other shards and commits the checkpoint, as during training.
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
    buffer: SnapshotBuffer,
    *,
    step: int,
    rank: int,
    world_size: int,
    url: str,
    keep: int,
    keep_best: int = 0,
    token: str,
) -> dict[int, int]:
    """Write one rank's shard of a checkpoint, and commit the checkpoint if the rank is 0.

    Returns: step → bytes of all checkpoints, if this shard's writer has committed this one; empty for other ranks,
        and if the shard could not be written: the writer's reason is in the agent's log.
    """
    snapshot = next((copy for copy in buffer.snapshots() if copy.step == step), None)
    if snapshot is None:
        return {}
    state = ""
    if rank == 0:
        progress, shape = Progress(**snapshot.state["progress"]), shape_from_record(buffer.about["shape"])
        state = state_bytes(progress, shape, unacked_metrics=snapshot.state.get("metrics", ())).decode()
    command = WriteCommand(
        url=url,
        step=step,
        slot=snapshot.slot,
        rank=rank,
        world_size=world_size,
        token=token,
        keep=keep,
        keep_best=keep_best,
        state=state,
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forge.checkpoint.writer_process", str(buffer.fd)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=[buffer.fd],
    )
    answer, _ = await process.communicate(json.dumps(asdict(command)).encode() + b"\n")
    for outcome in map(json.loads, answer.splitlines()):
        if "committed" in outcome:
            return {int(other): size for other, size in outcome["stored"].items()} | {step: outcome["committed"]}
    return {}
