"""Fork a checkpoint: copy it to another run, with that run's config digest.

In population-based training a trial continues from the state of a better trial, with its own hyperparameters. Whole
files are copied in chunks; only the config digest in the state file changes.
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


def fork_checkpoint(source: Storage, target: Storage, *, step: int, config_digest: str) -> None:
    """Replace all checkpoints in `target` by a copy of one checkpoint of `source`.

    It can be repeated after a kill at any moment, because the source is only read.

    Args:
        step: step of the checkpoint to copy.
        config_digest: digest of the run that continues from the copy; see `forge.plan.curve.config_digest`.

    Raises: CheckpointError if the checkpoint in `source` does not verify, or the copy cannot be written.
    """
    name = step_name(step)
    if _is_forked(target, name, config_digest=config_digest):
        return
    problem = verify_checkpoint(source, name)
    if problem is not None:
        raise CheckpointError(f"{source.url}/{name}: {problem}")
    original = open_checkpoint(source, name)
    token = f"forked{secrets.token_hex(4)}"
    state = state_bytes(replace(original.progress, config_digest=config_digest), original.shape)
    try:
        staging = target.open_staging(name, token=token)
        for part in original.manifest.parts:
            _copy_part(source, f"{name}/{part.name}", part, target, f"{staging}/{part.name}")
        target.write(f"{staging}/{state_name(token=token)}", lambda: [state])
        for former in list_checkpoints(target):
            target.remove(former, keep_token=token)
        last = manifest_bytes(step, parts=original.manifest.parts, state=state, token=token)
        target.publish(staging, name, last=(MANIFEST, last))
    except OSError as error:
        raise CheckpointError(f"{target.url}/{name} could not be written: {error}") from error


def _is_forked(target: Storage, name: str, *, config_digest: str) -> bool:
    if name not in list_checkpoints(target) or verify_checkpoint(target, name) is not None:
        return False
    return open_checkpoint(target, name).progress.config_digest == config_digest


def _copy_part(source: Storage, path: str, part: Part, target: Storage, target_path: str) -> None:
    def pieces() -> Iterator[memoryview]:
        for start in range(0, part.size_bytes, _PIECE_BYTES):
            piece = memoryview(bytearray(min(_PIECE_BYTES, part.size_bytes - start)))
            source.read_into(path, [(start, piece)])
            yield piece

    target.write(target_path, pieces)
