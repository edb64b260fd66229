"""A checkpoint as pretrained weights: `model.from_pretrained: runs/RUN/checkpoints/step-00001000`, a folder or URL.

A location may have been written elsewhere; what it contains is read as data, like every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from forge.checkpoint.best import best_scores
from forge.checkpoint.manifest import MANIFEST, step_name
from forge.checkpoint.reader import Checkpoint, list_checkpoints, open_checkpoint
from forge.checkpoint.storage import Storage, open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.config.checkpoint_path import is_checkpoint
from forge.errors import CheckpointError
from forge.fs import default_cache_dir, digest_file


def open_source(source: str) -> Checkpoint:
    """Open the checkpoint of a path or URL; sizes are checked, checksums are not.

    Raises: CheckpointError if it does not exist, or is not complete.
    """
    storage, name = _split(source)
    problem = verify_checkpoint(storage, name, with_checksums=False)
    if problem is not None:
        raise CheckpointError(f"{source}: {problem}")
    return open_checkpoint(storage, name)


def source_problem(source: str, *, share: tuple[int, int]) -> str | None:
    """Read a share of a checkpoint's bytes, as `verify_checkpoint` does. Returns: what is wrong, or None."""
    storage, name = _split(source)
    return verify_checkpoint(storage, name, share=share)


def source_digest(source: str) -> str:
    """Return a digest of a checkpoint's content: of its manifest, which holds the checksums of its files.

    Raises: CheckpointError if the manifest cannot be read.
    """
    storage, name = _split(source)
    try:
        return hashlib.blake2b(storage.read(f"{name}/{MANIFEST}"), digest_size=16).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{source}: {MANIFEST} cannot be read: {error}") from error


def weights_digest(source: str) -> str:
    """Return a digest of the weights of a checkpoint, or of a folder's configs and safetensors files.

    Raises: CheckpointError if there are none, or they cannot be read.
    """
    if is_checkpoint(source):
        return source_digest(source)
    folder = Path(source).expanduser()
    paths = sorted(
        path for kind in ("*.safetensors", "config.json", "adapter_config.json") for path in folder.glob(kind)
    )
    if not any(path.suffix == ".safetensors" for path in paths):
        raise CheckpointError(f"{source} has no safetensors files")
    try:
        digests = [(path.name, digest_file(path, cache=default_cache_dir() / "digests")) for path in paths]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    return hashlib.blake2b(json.dumps(digests).encode(), digest_size=16).hexdigest()


def choose_source(url: str) -> str:
    """Return the path or URL of the best checkpoint of a location or, if no step was evaluated, of the newest.

    Raises: CheckpointError if it has no complete checkpoint.
    """
    storage = open_storage(url)
    best = best_scores(storage, count=1)
    if best:
        return f"{storage.url}/{step_name(best[0].step)}"
    problems = []
    for name in list_checkpoints(storage):
        problem = verify_checkpoint(storage, name, with_checksums=False)
        if problem is None:
            return f"{storage.url}/{name}"
        problems.append(f"{name}: {problem}")
    raise CheckpointError(f"{url} has no complete checkpoint ({'; '.join(problems[:5]) or 'none at all'})")


def _split(source: str) -> tuple[Storage, str]:
    url, _, name = source.rstrip("/").rpartition("/")
    return open_storage(url), name
