"""Checkpoints under a prefix of an object store, or of anything else that fsspec can reach.

There is no rename, but each object appears atomically: the manifest is written last, and a folder without one is
not a checkpoint. Failed requests are retried for a while, as failures of object stores are often temporary.
"""

from __future__ import annotations

import contextlib
import errno
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from forge.checkpoint.intervals import Range
from forge.checkpoint.manifest import MANIFEST
from forge.checkpoint.storage_fs import MAX_SMALL_FILE_BYTES
from forge.errors import CheckpointError
from forge.foreign import require_direct_url

T = TypeVar("T")
# There are no locks: a folder without a manifest and without new objects for this long counts as abandoned.
_ABANDONED_AFTER_S = 86400.0
# Size of one request; the requests of a batch run concurrently, and their results are in memory together.
_REQUEST_BYTES = 8 * 2**20
_BATCH_BYTES = 64 * 2**20
# Ranges with a gap of at most this are fetched together: a request takes as long as this many bytes.
_MERGE_GAP_BYTES = 2**18
_FIRST_PAUSE_S = 0.5


class BucketStorage:
    """A prefix of an object store, or of anything else that fsspec can reach."""

    def __init__(self, url: str, *, patience_s: float) -> None:
        self.url = url.rstrip("/")
        self._patience_s = patience_s
        self._fs, self._root = _connect(self.url)

    def names(self) -> list[str]:
        """List every folder; readers skip those without a manifest."""
        return sorted({str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in self._list("")})

    def files(self, name: str) -> dict[str, int]:
        return {
            str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0)
            for entry in self._list(name)
            if entry["type"] == "file"
        }

    def free_bytes(self) -> int | None:
        return None

    def read(self, path: str) -> bytes:
        size = self._retry(lambda: int(self._fs.info(self._at(path)).get("size") or 0), f"read {path}")
        if size > MAX_SMALL_FILE_BYTES:
            raise OSError(
                errno.EFBIG, f"it has {size} bytes; forge reads at most {MAX_SMALL_FILE_BYTES} of it", path
            )
        found: bytes = self._retry(lambda: self._fs.cat_file(self._at(path)), f"read {path}")
        return found

    def read_into(self, path: str, ranges: Sequence[Range]) -> None:
        """Fetch batches of ranges concurrently; neighbouring ranges are fetched as one."""
        for batch in _group_in_batches(_merge_ranges(ranges)):
            starts, ends = [requests[0][0] for requests in batch], [_end(requests) for requests in batch]
            fetch = partial(self._fs.cat_ranges, [self._at(path)] * len(starts), starts, ends, on_error="raise")
            pieces = self._retry(fetch, f"read {path}")
            for requests, start, end, piece in zip(batch, starts, ends, pieces, strict=True):
                if len(piece) != end - start:
                    raise EOFError(f"{path} ends before byte {end}")
                for offset, view in requests:
                    view[:] = piece[offset - start : offset - start + len(view)]

    def crc32(self, path: str) -> int:
        size, crc = self.files(path.rpartition("/")[0]).get(path.rpartition("/")[2]), 0
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "is missing", path)
        buffer = memoryview(bytearray(min(size, _BATCH_BYTES)))
        for start in range(0, size, _BATCH_BYTES):
            piece = buffer[: size - start]
            self.read_into(path, [(start, piece)])
            crc = zlib.crc32(piece, crc)
        return crc

    def open_staging(self, name: str, *, token: str) -> str:
        """Return the final name: without a manifest it is not a checkpoint yet."""
        return name

    def write(self, path: str, chunks: Callable[[], Iterable[memoryview | bytes]]) -> None:
        """Write an object; start over if it fails."""

        def attempt() -> None:
            with self._fs.open(self._at(path), "wb") as file:
                for chunk in chunks():
                    file.write(chunk)

        self._retry(attempt, f"write {path}")

    def remove_files(self, staging: str, files: Sequence[str]) -> None:
        paths = [self._at(f"{staging}/{file}") for file in files]
        if paths:
            with contextlib.suppress(FileNotFoundError):
                self._retry(lambda: self._fs.rm(paths), f"remove {staging}")

    def publish(self, staging: str, name: str, *, last: tuple[str, bytes]) -> None:
        """Write the manifest, which makes it a checkpoint."""
        if last[0] in self.files(name):
            raise FileExistsError(errno.EEXIST, "already exists", name)
        self.write(f"{name}/{last[0]}", lambda: [last[1]])

    def discard(self, staging: str, *, token: str) -> None:
        self.remove_files(staging, [file for file in self.files(staging) if token in file])

    def remove(self, name: str, *, keep_token: str | None = None) -> None:
        """Remove the manifest first, so that no reader accepts a partly removed checkpoint."""
        own = [file for file in self.files(name) if keep_token is None or keep_token not in file]
        files = sorted(own, key=lambda file: file != MANIFEST)
        self.remove_files(name, files[:1])
        self.remove_files(name, files[1:])

    def sweep(self, *, own: str, up_to: str) -> None:
        """Remove folders without a manifest after a day: a long upload becomes visible only at its end."""
        for name in self.names():
            entries = [entry for entry in self._list(name) if entry["type"] == "file"]
            if any(str(entry["name"]).endswith(f"/{MANIFEST}") for entry in entries):
                continue
            if all(_age_s(self._fs, entry) > _ABANDONED_AFTER_S for entry in entries):
                self.remove(name)

    def _list(self, path: str) -> list[dict[str, Any]]:
        def attempt() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            try:
                found: list[dict[str, Any]] = self._fs.ls(self._at(path), detail=True)
            except FileNotFoundError:
                return []
            return [entry for entry in found if str(entry["name"]).rstrip("/") != self._at(path).rstrip("/")]

        return self._retry(attempt, f"list {path or self.url}")

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _retry(self, action: Callable[[], T], what: str) -> T:
        deadline, pause_s = time.monotonic() + self._patience_s, _FIRST_PAUSE_S
        while True:
            try:
                return action()
            except (FileNotFoundError, PermissionError, EOFError):
                raise
            except Exception as error:  # each fsspec implementation raises its own classes
                if time.monotonic() + pause_s > deadline:
                    raise OSError(f"{self.url}: could not {what}: {_one_line(error)}") from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 10.0)


def _connect(url: str) -> tuple[Any, str]:
    import fsspec  # slow to import, so only if an object store is used

    try:
        require_direct_url(url)
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}.get(url.partition("://")[0])
        cure = f"pip install 'forge-train[{extra}]'" if extra else "install the package it names"
        raise CheckpointError(f"{url}: {_one_line(error)}; {cure}") from error
    except Exception as error:  # unknown scheme, missing credentials: different classes per store
        raise CheckpointError(f"{url}: {_one_line(error)}") from error
    return fs, str(root).rstrip("/")


def _merge_ranges(ranges: Sequence[Range]) -> list[list[Range]]:
    """Split and sort ranges, and group those that one request fetches."""
    groups: list[list[Range]] = []
    end = 0
    for offset, view in sorted(_split_ranges(ranges), key=lambda entry: entry[0]):
        start = groups[-1][0][0] if groups else 0
        if groups and offset - end <= _MERGE_GAP_BYTES and offset + len(view) - start <= _REQUEST_BYTES:
            groups[-1].append((offset, view))
        else:
            groups.append([(offset, view)])
        end = max(end, offset + len(view))
    return groups


def _end(requests: list[Range]) -> int:
    """Return the end of a group of ranges, which may overlap."""
    return max(offset + len(view) for offset, view in requests)


def _split_ranges(ranges: Sequence[Range]) -> Iterator[Range]:
    for offset, view in ranges:
        for at in range(0, len(view), _REQUEST_BYTES):
            yield offset + at, view[at : at + _REQUEST_BYTES]


def _group_in_batches(groups: list[list[Range]]) -> list[list[list[Range]]]:
    """Collect groups into batches of about `_BATCH_BYTES`."""
    batches: list[list[list[Range]]] = []
    size = _BATCH_BYTES
    for group in groups:
        group_bytes = _end(group) - group[0][0]
        if size + group_bytes > _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(group)
        size += group_bytes
    return batches


def _age_s(fs: Any, entry: dict[str, Any]) -> float:
    """Return the seconds since an object was written; 0 if unknown."""
    try:
        return float(time.time() - fs.modified(entry["name"]).timestamp())
    except (NotImplementedError, OSError, AttributeError):
        return 0.0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
