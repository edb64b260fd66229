"""Where checkpoints lie: a folder of a file system, or a prefix of an object store.

Both offer the same few operations, and both make a checkpoint appear at once: see `forge.checkpoint.storage_fs`
and `forge.checkpoint.storage_object`. Any URL that fsspec knows works (`s3://`, `gs://`, `abfs://`, `memory://`,
...).
Every failure is an OSError with a text for people.
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
        """What lies there, drafts left out; empty if nothing was ever written."""

    def files(self, name: str) -> dict[str, int]:
        """The files of one checkpoint or draft with their bytes; empty if it is not there."""

    def read(self, path: str) -> bytes:
        """A whole small file. Raises: FileNotFoundError, OSError."""

    def read_into(self, path: str, ranges: Sequence[Range]) -> None:
        """Fill each view from its place on. Raises: FileNotFoundError, OSError; EOFError if the file is short."""

    def crc32(self, path: str) -> int:
        """Of a whole file, read piece by piece. Raises: FileNotFoundError, OSError."""

    def open_draft(self, name: str, *, token: str) -> str:
        """Where the files of a checkpoint to be are written; every one of its writers asks with the same token."""

    def hold(self, draft: str) -> None:
        """Show others that this draft's writer lives, as long as this process does."""

    def write(self, path: str, chunks: Callable[[], Iterable[memoryview | bytes]]) -> None:
        """Write a file that survives a power cut. Raises: OSError."""

    def drop(self, draft: str, files: Sequence[str]) -> None:
        """Take away files of a draft."""

    def publish(self, draft: str, name: str, *, last: tuple[str, bytes]) -> None:
        """Write the last file of a draft, and let the checkpoint appear.

        Raises: FileExistsError if there is something of that name; the draft is still there then.
        """

    def discard(self, draft: str, *, token: str) -> None:
        """Take away what the writers with this token have written of a draft."""

    def remove(self, name: str, *, sparing: str | None = None) -> None:
        """Take a checkpoint away, if it is there.

        Args:
            sparing: the token of a draft for the same place, which is not touched.
        """

    def sweep(self, *, own: str, up_to: str) -> None:
        """Take away what dead writers have left.

        Args:
            own: how the tokens of the caller and its peers begin.
            up_to: the token of theirs up to which all is sealed or given up.
        """


def open_storage(url: str, *, patience_s: float = 120.0) -> Storage:
    """The storage behind a path or URL.

    Args:
        patience_s: how long an object store that fails is asked again.

    Raises: CheckpointError if the scheme is unknown or its package is not installed.
    """
    if "://" not in url or url.startswith(("file://", "local://")):
        return FolderStorage(Path(url.partition("://")[2] or url))
    return BucketStorage(url, patience_s=patience_s)
