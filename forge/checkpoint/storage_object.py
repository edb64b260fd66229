"""Checkpoints under a prefix of an object store, or of anything else that fsspec can reach.

There is no renaming there, but objects appear whole: the manifest is written last, and a folder without
one is no checkpoint. Stores fail in passing, so they are asked again for a while.
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
from forge.errors import CheckpointError

T = TypeVar("T")
# There are no locks: a folder to which nothing was added for this long is given up.
_ABANDONED_AFTER_S = 86400.0
# One request; requests of a batch run side by side and are held in memory at once.
_REQUEST_BYTES = 8 * 2**20
_BATCH_BYTES = 64 * 2**20
# Ranges of an object that lie this near are fetched as one: a request costs as much as this many bytes.
_GAP_BYTES = 2**18
_FIRST_PAUSE_S = 0.5


class BucketStorage:
    """A prefix of an object store, or of anything else that fsspec can reach."""

    def __init__(self, url: str, *, patience_s: float) -> None:
        self.url = url.rstrip("/")
        self._patience_s = patience_s
        self._fs, self._root = _connect(self.url)

    def names(self) -> list[str]:
        """Every folder; those without a manifest are told apart by whoever reads them."""
        return sorted({str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in self._list("")})

    def files(self, name: str) -> dict[str, int]:
        """Objects and their bytes."""
        return {
            str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0)
            for entry in self._list(name)
            if entry["type"] == "file"
        }

    def read(self, path: str) -> bytes:
        """A whole small object."""
        found: bytes = self._patiently(lambda: self._fs.cat_file(self._at(path)), f"read {path}")
        return found

    def read_into(self, path: str, ranges: Sequence[Range]) -> None:
        """Fetch batches of ranges side by side; those that lie together are fetched as one."""
        for batch in _batches(_joined(ranges)):
            starts, ends = [requests[0][0] for requests in batch], [_end(requests) for requests in batch]
            fetch = partial(self._fs.cat_ranges, [self._at(path)] * len(starts), starts, ends, on_error="raise")
            pieces = self._patiently(fetch, f"read {path}")
            for requests, start, end, piece in zip(batch, starts, ends, pieces, strict=True):
                if len(piece) != end - start:
                    raise EOFError(f"{path} ends before byte {end}")
                for offset, view in requests:
                    view[:] = piece[offset - start : offset - start + len(view)]

    def crc32(self, path: str) -> int:
        """Of a whole object."""
        size, found = self.files(path.rpartition("/")[0]).get(path.rpartition("/")[2]), 0
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "is missing", path)
        buffer = memoryview(bytearray(min(size, _BATCH_BYTES)))
        for start in range(0, size, _BATCH_BYTES):
            piece = buffer[: size - start]
            self.read_into(path, [(start, piece)])
            found = zlib.crc32(piece, found)
        return found

    def open_draft(self, name: str, *, token: str) -> str:
        """The place itself: without a manifest it is no checkpoint."""
        return name

    def hold(self, draft: str) -> None:
        """An object store has no locks; drafts are judged by their age."""

    def write(self, path: str, chunks: Callable[[], Iterable[memoryview | bytes]]) -> None:
        """Write an object, from the beginning again if it fails."""

        def attempt() -> None:
            with self._fs.open(self._at(path), "wb") as file:
                for chunk in chunks():
                    file.write(chunk)

        self._patiently(attempt, f"write {path}")

    def drop(self, draft: str, files: Sequence[str]) -> None:
        """Take away objects of a draft."""
        places = [self._at(f"{draft}/{file}") for file in files]
        if places:
            with contextlib.suppress(FileNotFoundError):
                self._patiently(lambda: self._fs.rm(places), f"remove {draft}")

    def publish(self, draft: str, name: str, *, last: tuple[str, bytes]) -> None:
        """The last object makes it whole."""
        if last[0] in self.files(name):
            raise FileExistsError(errno.EEXIST, "is there already", name)
        self.write(f"{name}/{last[0]}", lambda: [last[1]])

    def discard(self, draft: str, *, token: str) -> None:
        """The objects that bear the token."""
        self.drop(draft, [file for file in self.files(draft) if token in file])

    def remove(self, name: str, *, sparing: str | None = None) -> None:
        """The manifest first, so that nobody believes a checkpoint of which half is gone."""
        going = [file for file in self.files(name) if sparing is None or sparing not in file]
        files = sorted(going, key=lambda file: file != MANIFEST)
        self.drop(name, files[:1])
        self.drop(name, files[1:])

    def sweep(self, *, own: str, up_to: str) -> None:
        """Folders without a manifest, to which nothing was added for a day: a long upload shows only at its end."""
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

        return self._patiently(attempt, f"list {path or self.url}")

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _patiently(self, action: Callable[[], T], what: str) -> T:
        deadline, pause_s = time.monotonic() + self._patience_s, _FIRST_PAUSE_S
        while True:
            try:
                return action()
            except (FileNotFoundError, PermissionError, EOFError):
                raise
            except Exception as error:  # every store's package raises classes of its own
                if time.monotonic() + pause_s > deadline:
                    raise OSError(f"{self.url}: could not {what}: {_one_line(error)}") from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 10.0)


def _connect(url: str) -> tuple[Any, str]:
    import fsspec  # only where an object store is used: it is slow to import

    try:
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}.get(url.partition("://")[0])
        cure = f"pip install 'forge-train[{extra}]'" if extra else "install the package it names"
        raise CheckpointError(f"{url}: {_one_line(error)}; {cure}") from error
    except Exception as error:  # unknown schemes, missing credentials: a class for each store
        raise CheckpointError(f"{url}: {_one_line(error)}") from error
    return fs, str(root).rstrip("/")


def _joined(ranges: Sequence[Range]) -> list[list[Range]]:
    """Ranges in order and in pieces of one request, those in one list that are to be fetched as one."""
    groups: list[list[Range]] = []
    end = 0
    for offset, view in sorted(_pieces(ranges), key=lambda entry: entry[0]):
        start = groups[-1][0][0] if groups else 0
        if groups and offset - end <= _GAP_BYTES and offset + len(view) - start <= _REQUEST_BYTES:
            groups[-1].append((offset, view))
        else:
            groups.append([(offset, view)])
        end = max(end, offset + len(view))
    return groups


def _end(requests: list[Range]) -> int:
    """The byte after the last one that any of these asks for; they may overlap."""
    return max(offset + len(view) for offset, view in requests)


def _pieces(ranges: Sequence[Range]) -> Iterator[Range]:
    for offset, view in ranges:
        for at in range(0, len(view), _REQUEST_BYTES):
            yield offset + at, view[at : at + _REQUEST_BYTES]


def _batches(groups: list[list[Range]]) -> list[list[list[Range]]]:
    """Groups that are fetched side by side, together not much more than one batch."""
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
    """Seconds since an object was written; 0 if the store does not say."""
    try:
        return float(time.time() - fs.modified(entry["name"]).timestamp())
    except (NotImplementedError, OSError, AttributeError):
        return 0.0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
