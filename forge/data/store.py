"""Token shards: the format of a prepared corpus on disk, and its reader.

    <folder>/index.json              written last: the files with sizes and checksums
             train-00000.tokens …    little-endian token ids, uint16 or uint32, nothing else
             held_out-00000.tokens …
             tokenizer/              the Hugging Face layout

Chunks of token ids are written in order and read as memory-mapped windows. Documents are concatenated,
each followed by the end-of-text token; the reader decides where sequences begin, so one cache serves
every sequence length. `forge.data.cache_index` has the index. This module needs only numpy: ranks import it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from forge.errors import DataError

SHARD_TOKENS = 1 << 27
"""Tokens of a full shard: 256 MiB as uint16, small enough to copy and to check one by one."""

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of the cache; `name` is relative to its folder, `blake2b` has 16 bytes, in hex."""

    name: str
    size_bytes: int
    blake2b: str


@dataclass(slots=True, kw_only=True)
class TokenStream:
    """Tokens in order over several shards, read as windows; the files are mapped, not loaded.

    Raises: DataError if a shard is missing or has another size than the index says.
    """

    folder: Path
    entries: tuple[FileEntry, ...]
    dtype: str
    _starts: NDArray[np.int64] = field(init=False, repr=False)
    _maps: dict[int, NDArray[Any]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        verify_sizes(self.folder, self.entries)
        itemsize = np.dtype(self.dtype).itemsize
        counts = [0] + [entry.size_bytes // itemsize for entry in self.entries]
        self._starts = np.cumsum(counts, dtype=np.int64)

    def __getstate__(self) -> tuple[Path, tuple[FileEntry, ...], str]:
        return self.folder, self.entries, self.dtype  # never the mapped tokens

    def __setstate__(self, state: tuple[Path, tuple[FileEntry, ...], str]) -> None:
        self.folder, self.entries, self.dtype = state
        self._maps = {}
        self.__post_init__()

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    def num_sequences(self, seq_len: int) -> int:
        """Windows of `seq_len` predicted tokens that do not overlap: (n - 1) // T, the last needs a label."""
        return max(0, self.num_tokens - 1) // seq_len

    def read(self, sample_indices: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
        """Window i is tokens [i·T, i·T + T + 1): T inputs, and the same shifted by one as labels.

        Shapes: `sample_indices: int64[B]` → `int64[B, T + 1]`.

        Raises: IndexError if an index is not in [0, num_sequences).
        """
        total = self.num_sequences(seq_len)
        if len(sample_indices) and not 0 <= sample_indices.min() <= sample_indices.max() < total:
            raise IndexError(f"sequences run from 0 to {total - 1}, asked for {sample_indices.tolist()}")
        windows = np.empty((len(sample_indices), seq_len + 1), dtype=np.int64)
        for window, index in zip(windows, sample_indices.tolist(), strict=True):
            self._fill(window, start=index * seq_len)
        return windows

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens [start, stop) of the stream. Shapes: int64[stop - start]."""
        window = np.empty(stop - start, dtype=np.int64)
        self._fill(window, start=start)
        return window

    def _fill(self, window: NDArray[np.int64], *, start: int) -> None:
        filled = 0
        while filled < len(window):
            shard = int(np.searchsorted(self._starts, start + filled, side="right")) - 1
            offset = start + filled - int(self._starts[shard])
            part = self._shard(shard)[offset : offset + len(window) - filled]
            window[filled : filled + len(part)] = part
            filled += len(part)

    def _shard(self, number: int) -> NDArray[Any]:
        mapped = self._maps.get(number)
        if mapped is None:
            path = self.folder / self.entries[number].name
            mapped = self._maps[number] = np.memmap(path, dtype=self.dtype, mode="r").view(np.ndarray)
        return mapped


class StreamWriter:
    """Writes one stream as shards of at most `shard_tokens` tokens, and counts how often each id occurs.

    A shard is flushed to the disk when full.

    Raises: OSError from the file system; the caller knows what to say about it.
    """

    def __init__(self, folder: Path, *, name: str, vocab_size: int, shard_tokens: int | None = None) -> None:
        self.num_tokens = 0
        self.counts: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._folder = folder
        self._name = name
        self._shard_bytes = (shard_tokens or SHARD_TOKENS) * self._dtype.itemsize
        self._entries: list[FileEntry] = []
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None
        self._hash = new_hash()
        self._size_bytes = 0

    def append(self, ids: bytes) -> None:
        """Token ids as little-endian bytes of the stream's dtype; nothing is written before a block is full."""
        self._buffer += ids
        self.num_tokens += len(ids) // self._dtype.itemsize
        if len(self._buffer) >= _BLOCK_BYTES:
            self._write(bytes(self._buffer))
            self._buffer.clear()

    def _write(self, content: bytes) -> None:
        self.counts += np.bincount(np.frombuffer(content, dtype=self._dtype), minlength=len(self.counts))
        view = memoryview(content)
        while view:
            if self._file is None:
                self._file = (self._folder / self._shard_name).open("wb")
            part = view[: self._shard_bytes - self._size_bytes]
            self._file.write(part)
            self._hash.update(part)
            self._size_bytes += len(part)
            view = view[len(part) :]
            if self._size_bytes == self._shard_bytes:
                self._finish_shard()

    def close(self) -> tuple[FileEntry, ...]:
        """Write what is left and finish the last shard; the entries of all."""
        self._write(bytes(self._buffer))
        self._buffer.clear()
        if self._file is not None:
            self._finish_shard()
        return tuple(self._entries)

    def abort(self) -> None:
        """Close the open file, whatever its state."""
        if self._file is not None:
            handle, self._file = self._file, None
            try:
                handle.close()
            except OSError:  # a full disk refuses the buffered rest; the error was already raised once
                return

    @property
    def _shard_name(self) -> str:
        return f"{self._name}-{len(self._entries):05d}.tokens"

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = FileEntry(name=self._shard_name, size_bytes=self._size_bytes, blake2b=self._hash.hexdigest())
        self._entries.append(entry)
        self._file, self._hash, self._size_bytes = None, new_hash(), 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Held out are the documents whose key is below `key_below`; or, if given, all tokens from `tail_from` on."""

    key_below: int = 0
    tail_from: int | None = None


KEY_SPACE = 1 << 64
"""Keys of documents are in [0, 2⁶⁴)."""


def document_key(content: bytes, *, seed: int) -> int:
    """The keyed hash that decides on which side a document falls; of a long one, that of its first piece."""
    digest = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


class Packer:
    """Packs documents end to end into the two streams, each followed by the end-of-text token.

    Raises: OSError from the file system.
    """

    def __init__(self, folder: Path, *, vocab_size: int, eot_id: int, split: Split, seed: int) -> None:
        self.train = StreamWriter(folder, name="train", vocab_size=vocab_size)
        self.held_out = StreamWriter(folder, name="held_out", vocab_size=vocab_size)
        self.num_documents = 0
        self.num_text_bytes = 0
        self.smallest_key = KEY_SPACE
        self.largest_key = -1
        self.lengths: Counter[int] = Counter()
        """How many documents have each number of tokens, the end-of-text token included."""
        self._length = 0
        self.split = split
        self._seed = seed
        self._eot = np.array([eot_id], dtype=token_dtype(vocab_size)).tobytes()
        self._side = self.train

    @property
    def num_tokens(self) -> int:
        return self.train.num_tokens + self.held_out.num_tokens

    def add(self, content: bytes, *, ids: bytes, starts: bool, ends: bool) -> None:
        """A document or a piece of one: its text in UTF-8, and its ids as bytes of the stream's dtype."""
        self.num_text_bytes += len(content)
        if starts:
            self._start_document(document_key(content, seed=self._seed))
        if ends:
            ids += self._eot
        self._length += len(ids) // len(self._eot)
        if ends:
            self.lengths[self._length] += 1
        if self.split.tail_from is None:
            self._side.append(ids)
        else:
            room = max(0, self.split.tail_from - self.train.num_tokens) * len(self._eot)
            self.train.append(ids[:room])
            self.held_out.append(ids[room:])

    def close(self) -> None:
        self.train.close()
        self.held_out.close()

    def abort(self) -> None:
        """Close open files; harmless after `close`."""
        self.train.abort()
        self.held_out.abort()

    def _start_document(self, key: int) -> None:
        self._side = self.held_out if key < self.split.key_below else self.train
        self.num_documents += 1
        self._length = 0
        self.smallest_key = min(self.smallest_key, key)
        self.largest_key = max(self.largest_key, key)


def token_dtype(vocab_size: int) -> str:
    """`<u2` as long as every id fits in 16 bits, else `<u4`."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def new_hash() -> hashlib.blake2b:
    """The checksum of this format: 128 bits find any accident."""
    return hashlib.blake2b(digest_size=16)


def write_file(folder: Path, *, name: str, content: bytes) -> FileEntry:
    """Write a small file, flushed to the disk. Returns: its entry."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(name=name, size_bytes=len(content), blake2b=checksum(content))


class HashedFile:
    """A new file whose checksum is computed while it is written."""

    def __init__(self, folder: Path, *, name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        self._name = name
        self._file: IO[bytes] = (folder / name).open("wb")
        self._hash = new_hash()
        self._size_bytes = 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._size_bytes += len(content)

    def close(self) -> FileEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(name=self._name, size_bytes=self._size_bytes, blake2b=self._hash.hexdigest())

    def abort(self) -> None:
        try:
            self._file.close()
        except OSError:  # a full disk refuses the buffered rest; the error was already raised once
            return


def verify_sizes(folder: Path, entries: tuple[FileEntry, ...]) -> None:
    """Cheap, done on every opening.

    Raises: DataError naming the file, the size it has and the size it should have.
    """
    for entry in entries:
        path = folder / entry.name
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} is part of the token cache but cannot be read ({error.strerror})") from None
        if size_bytes != entry.size_bytes:
            raise DataError(f"{path} has {size_bytes} bytes, the index says {entry.size_bytes}; delete {folder}")


def hash_file(path: Path) -> str:
    """The checksum of a file, read block by block.

    Raises: DataError if it cannot be read.
    """
    digest = new_hash()
    try:
        for block in _blocks(path):
            digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def checksum(content: bytes) -> str:
    """The checksum of some bytes, in hex."""
    digest = new_hash()
    digest.update(content)
    return digest.hexdigest()
