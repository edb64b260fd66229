"""A checkpoint taken over by another run: the same tensors under another config digest.

A trial of a population goes on from the state of a better one, with other values of its own. The copy is whole
files, read and written piece by piece; what it says of itself, its config digest, is the other run's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace

from forge.checkpoint.manifest import MANIFEST, Part, manifest_bytes, state_bytes, state_name, step_name
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import Storage
from forge.checkpoint.verify import verify_checkpoint
from forge.errors import CheckpointError

_PIECE_BYTES = 8 * 2**20


def adopt_checkpoint(source: Storage, target: Storage, *, step: int, config_digest: str) -> None:
    """Have, in the place of all that lies in `target`, a copy of the checkpoint of a step in `source`.

    Killed at any moment, it can be done again: the source is only read.

    Args:
        config_digest: of the run that continues from the copy; see `forge.plan.plan.config_digest`.

    Raises: CheckpointError if the source has no such checkpoint that verifies, or the copy cannot be written.
    """
    name = step_name(step)
    if _is_adopted(target, name, config_digest=config_digest):
        return
    problem = verify_checkpoint(source, name)
    if problem is not None:
        raise CheckpointError(f"{source.url}/{name}: {problem}")
    original = open_checkpoint(source, name)
    token = f"adopted{secrets.token_hex(4)}"
    state = state_bytes(replace(original.progress, config_digest=config_digest), original.shape)
    try:
        draft = target.open_draft(name, token=token)
        target.hold(draft)
        for part in original.manifest.parts:
            _copy(source, f"{name}/{part.name}", part, target, f"{draft}/{part.name}")
        target.write(f"{draft}/{state_name(token=token)}", lambda: [state])
        for former in list_checkpoints(target):
            target.remove(former, sparing=token)
        last = manifest_bytes(step, parts=original.manifest.parts, state=state, token=token)
        target.publish(draft, name, last=(MANIFEST, last))
    except OSError as error:
        raise CheckpointError(f"{target.url}/{name} could not be written: {error}") from error


def _is_adopted(target: Storage, name: str, *, config_digest: str) -> bool:
    if name not in list_checkpoints(target) or verify_checkpoint(target, name) is not None:
        return False
    return open_checkpoint(target, name).progress.config_digest == config_digest


def _copy(source: Storage, path: str, part: Part, target: Storage, place: str) -> None:
    def pieces() -> Iterator[memoryview]:
        for start in range(0, part.size_bytes, _PIECE_BYTES):
            piece = memoryview(bytearray(min(_PIECE_BYTES, part.size_bytes - start)))
            source.read_into(path, [(start, piece)])
            yield piece

    target.write(place, pieces)
