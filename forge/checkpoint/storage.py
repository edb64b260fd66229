"""Storage of checkpoints: a folder of a file system, or a prefix of an object store.

Both implement the protocol `Storage`, and both publish a checkpoint atomically: see `forge.checkpoint.storage_fs`
and `forge.checkpoint.storage_object`. Any URL that fsspec supports works (`s3://`, `gs://`, `abfs://`, `memory://`,
...). Every failure is an OSError with a readable message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from forge.checkpoint.intervals import Range
from forge.checkpoint.storage_fs import FolderStorage
from forge.checkpoint.storage_object import BucketStorage


class Storage(Protocol):
    """Checkpoints by name (`step-00001000`), and the files within one."""

    url: str

    def names(self) -> list[str]:
        """List all names, without staging folders; empty if nothing was written yet."""

    def files(self, name: str) -> dict[str, int]:
        """Return file sizes by name, in bytes, of a checkpoint or staging folder; empty if it does not exist."""

    def read(self, path: str) -> bytes:
        """Read a small file completely. Raises: FileNotFoundError, OSError."""

    def read_into(self, path: str, ranges: Sequence[Range]) -> None:
        """Fill each view from its offset. Raises: FileNotFoundError, OSError; EOFError if the file is too short."""

    def crc32(self, path: str) -> int:
        """Return the CRC-32 of a file, read in chunks. Raises: FileNotFoundError, OSError."""

    def free_bytes(self) -> int | None:
        """Return how much can still be written; None if there is no limit, or it is not known."""

    def open_staging(self, name: str, *, token: str) -> str:
        """Create the staging folder of a checkpoint and return its name; all its writers pass the same token.

        It counts as in use until this process ends or opens the staging folder of another checkpoint.
        """

    def write(self, path: str, chunks: Callable[[], Iterable[memoryview | bytes]]) -> None:
        """Write a file durably. Raises: OSError."""

    def remove_files(self, staging: str, files: Sequence[str]) -> None:
        """Remove files of a staging folder."""

    def publish(self, staging: str, name: str, *, last: tuple[str, bytes]) -> None:
        """Write the last file and turn the staging folder into a checkpoint, atomically.

        Raises: FileExistsError if the name exists; the staging folder is kept then.
        """

    def discard(self, staging: str, *, token: str) -> None:
        """Remove the files with this token from a staging folder."""

    def remove(self, name: str, *, keep_token: str | None = None) -> None:
        """Remove a checkpoint, if it exists.

        Args:
            keep_token: keep files with this token, which belong to the checkpoint that replaces it.
        """

    def sweep(self, *, own: str, up_to: str) -> None:
        """Remove what dead writers have left behind.

        Args:
            own: common prefix of the tokens of the caller and its peers.
            up_to: their last token whose checkpoint is committed or aborted.
        """


def open_storage(url: str, *, patience_s: float = 120.0) -> Storage:
    """Open the storage of a path or URL.

    Args:
        patience_s: how long failed requests to an object store are retried, in seconds.

    Raises: CheckpointError if the scheme is unknown or its package is not installed.
    """
    if "://" not in url or url.startswith(("file://", "local://")):
        return FolderStorage(Path(url.partition("://")[2] or url))
    return BucketStorage(url, patience_s=patience_s)
