"""Verify checkpoints: manifest, sizes, checksums, and that every element is stored exactly once.

A checkpoint that does not verify is skipped, and the previous one is tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from forge.checkpoint.reader import (
    Checkpoint,
    file_name_of,
    list_checkpoints,
    open_checkpoint,
    read_checkpoint,
    read_manifest,
)
from forge.checkpoint.storage import Storage
from forge.errors import CheckpointError


def verify_checkpoint(
    storage: Storage, name: str, *, with_checksums: bool = True, share: tuple[int, int] = (0, 1)
) -> str | None:
    """Check the manifest, then every size, then the checksums. Returns: what is wrong, or None.

    Args:
        with_checksums: read all data and compare checksums; otherwise only sizes are compared.
        share: (r, W): check only every W-th checksum, starting at the r-th, so that W ranks share the reading.
    """
    try:
        manifest = read_manifest(storage, name)
        sizes = storage.files(name)
        expected = [(manifest.state_name, manifest.state_size_bytes, manifest.state_crc32)]
        expected += [(part.name, part.size_bytes, part.crc32) for part in manifest.parts]
        for file, size, _ in expected:
            if file not in sizes:
                return f"{file} is missing"
            if sizes[file] != size:
                return f"{file} has {sizes[file]} bytes, its manifest says {size}"
        for file, _, crc in expected[share[0] :: share[1]] if with_checksums else ():
            if storage.crc32(f"{name}/{file}") != crc:
                return f"{file} does not match its checksum"
        read_checkpoint(storage, name)
    except FileNotFoundError as error:
        return f"{file_name_of(error)} is missing"
    except (OSError, EOFError, ValueError) as error:
        return str(error)
    return None


def stored_steps(storage: Storage) -> dict[int, int]:
    """Return step → size in bytes of every checkpoint whose files have their sizes, oldest first.

    Raises: CheckpointError if the storage cannot be listed.
    """
    found: dict[int, int] = {}
    for name in reversed(list_checkpoints(storage)):
        if verify_checkpoint(storage, name, with_checksums=False) is None:
            with contextlib.suppress(OSError, ValueError):  # removed since
                manifest = read_manifest(storage, name)
                found[manifest.step] = manifest.size_bytes
    return found


def find_checkpoint(storage: Storage, *, on_skip: Callable[[str, str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, skipping broken ones; None if there is none.

    Args:
        on_skip: called with the name of each skipped checkpoint and the reason.
    """
    for name in list_checkpoints(storage):
        problem = verify_checkpoint(storage, name)
        try:
            if problem is None:
                return open_checkpoint(storage, name)
        except CheckpointError as error:  # removed since by a running job that keeps only the newest
            problem = str(error)
        on_skip(name, problem)
    return None
