"""Records from files: text, JSON lines and Parquet, compressed or not, local or remote.

Files are read pattern by pattern, sorted by path within each pattern. Text is kept byte for byte, without newline
translation; only a UTF-8 byte order mark is removed. A text file is one record, in pieces if it is long.
"""

from __future__ import annotations

import codecs
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from forge.data.sources.base import Record
from forge.data.sources.pieces import PIECE_CHARS, pieces_of
from forge.data.store import hash_file, new_hash
from forge.errors import DataError

_MAX_LINE_BYTES = 1 << 28
"""A .jsonl line is parsed whole; one longer than 256 MiB is a file of another kind."""

_CODEC_PACKAGES = {".zst": "zstandard", ".zstd": "zstandard", ".lz4": "lz4", ".snappy": "python-snappy"}
"""Compressions that fsspec knows only when another package is there."""

_REMOTE_IDENTITY = ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "last_modified", "mtime", "created")
"""What the file systems of fsspec call the version of a file."""

_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of the corpus. `name` is the path below the fixed part of its pattern."""

    fs: Any
    path: str
    name: str
    kind: Literal["text", "jsonl", "parquet", "python"]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """The records of files.

    Args:
        patterns: globs or fsspec URLs.
        text_key: field that holds the content of a text file.
        columns: fields that every record must have; others are not read where the file type allows it. None: all.
    """

    patterns: tuple[str, ...]
    text_key: str = "text"
    columns: tuple[str, ...] | None = None

    def files(self) -> list[SourceFile]:
        """Every file once, in order. Raises: DataError for a pattern that matches no file."""
        found: dict[tuple[int, str], SourceFile] = {}
        for pattern in self.patterns:
            for file in _match(pattern):
                found.setdefault((id(file.fs), file.path), file)  # fsspec keeps one instance per file system
        return list(found.values())

    def fingerprint(self) -> str:
        """Digest of names and content.

        Local files count with their content, so a moved folder is still the same corpus. Remote files count with
        size and what the store gives as identity (etag, checksum or time of change).
        """
        return fingerprint_of(self.files())

    def parts(self) -> Sequence[Iterable[Record]]:
        return [_LazyRecords(file=file, source=self) for file in self.files()]

    def records(self) -> Iterator[Record]:
        return chain.from_iterable(self.parts())


@dataclass(frozen=True, slots=True, kw_only=True)
class _LazyRecords:
    """The records of one file, which is opened when they are iterated over."""

    file: SourceFile
    source: FileSource

    def __iter__(self) -> Iterator[Record]:
        file, columns = self.file, self.source.columns
        readers: dict[str, Callable[[], Iterator[Record]]] = {
            "text": lambda: _read_text(file, text_key=self.source.text_key),
            "jsonl": lambda: _read_jsonl(file, columns=columns),
            "parquet": lambda: _read_parquet(file, columns=columns),
        }
        try:
            yield from readers[file.kind]()
        except _UNREADABLE as error:
            raise DataError(f"{file.path} cannot be read: {error}") from None


def fingerprint_of(files: Iterable[SourceFile]) -> str:
    """Digest of the names and the content of files. Raises: DataError if one cannot be read."""
    digest = new_hash()
    for file in files:
        identity = hash_file(Path(file.path)) if file.is_local else _remote_identity(file)
        digest.update(json.dumps([file.name, identity]).encode())
    return digest.hexdigest()


def _match(pattern: str) -> list[SourceFile]:
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        paths = _glob(fs, path) if _is_glob(fs, path) else [path] if fs.exists(path) else []
        if paths == [path] and fs.isdir(path):
            raise DataError(f"data.files: {pattern} is a folder; name the files in it, like {pattern}/**/*.txt")
    except (ImportError, ValueError) as error:  # the package of this protocol is missing, or no such protocol
        raise DataError(f"data.files: {pattern} cannot be opened: {error}") from None
    except OSError as error:
        raise DataError(f"data.files: {pattern} cannot be listed: {error}") from None
    if not paths:
        place = f" (looked in {Path.cwd()})" if isinstance(fs, LocalFileSystem) else ""
        raise DataError(f"data.files: {pattern} matches no file{place}")
    fixed = re.split(r"[*?\[]", path, maxsplit=1)[0] if len(paths) > 1 or paths != [path] else path
    root = fixed.rpartition("/")[0] + "/"
    return [SourceFile(fs=fs, path=one, name=one.removeprefix(root), kind=_kind(one)) for one in paths]


def _is_glob(fs: Any, path: str) -> bool:
    if path.startswith(("http://", "https://")):
        return "*" in path  # a question mark begins the query
    return bool(fsspec.core.has_magic(path)) and not (isinstance(fs, LocalFileSystem) and Path(path).exists())


def _glob(fs: Any, path: str) -> list[str]:
    return sorted(name for name, info in fs.glob(path, detail=True).items() if info["type"] == "file")


def _kind(path: str) -> Literal["text", "jsonl", "parquet"]:
    name = path.partition("?")[0].lower()
    if infer_compression(name):
        name = name.rpartition(".")[0]
    if name.endswith(".jsonl"):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def _remote_identity(file: SourceFile) -> str:
    try:
        info = file.fs.info(file.path)
    except OSError as error:
        raise DataError(f"{file.path} cannot be examined: {error}") from None
    known = {key: str(info[key]) for key in ("size", *_REMOTE_IDENTITY) if info.get(key) is not None}
    return json.dumps(known, sort_keys=True)


def _open(file: SourceFile) -> IO[bytes]:
    name = file.path.partition("?")[0] if "://" in file.path else file.path
    package = _CODEC_PACKAGES.get(Path(name).suffix)
    compression = infer_compression(name)
    if package and not compression:
        raise DataError(f"{file.path} is compressed; to unpack it: pip install {package}")
    opened: IO[bytes] = file.fs.open(file.path, "rb", compression=compression)
    return opened


def _read_text(file: SourceFile, *, text_key: str) -> Iterator[Record]:
    with _open(file) as stream:
        yield from text_records(file, _decode(stream, path=file.path), text_key=text_key)


def text_records(file: SourceFile, blocks: Iterable[str], *, text_key: str) -> Iterator[Record]:
    """The text of one file as one record, in pieces; an empty text has none."""
    for piece in pieces_of(blocks):
        fields = {text_key: piece.text}
        yield Record(name=file.name, location=file.path, fields=fields, starts=piece.starts, ends=piece.ends)


def _decode(stream: IO[bytes], *, path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while True:
        block = stream.read(PIECE_CHARS)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset=offset - pending + error.start) from None
        yield text.removeprefix("\ufeff") if offset == 0 else text
        if not block:
            return
        offset += len(block)


def _read_jsonl(file: SourceFile, *, columns: tuple[str, ...] | None) -> Iterator[Record]:
    with _open(file) as stream:
        number = offset = 0
        while line := stream.readline(_MAX_LINE_BYTES):
            number += 1
            location = f"{file.path}:{number}"
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise DataError(f"{location}: the line is longer than {_MAX_LINE_BYTES} bytes")
            if line.strip():
                fields = _parse_line(line, location=location, offset=offset)
                _require_columns(fields, columns, location=location)
                yield Record(name=f"{file.name}:{number}", location=location, fields=fields)
            offset += len(line)


def _parse_line(line: bytes, *, location: str, offset: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(location, offset=offset + error.start) from None
    except ValueError as error:
        raise DataError(f"{location}: not a line of JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{location}: a line must be a JSON object, this one is {json_name(record)}")
    return record


def _require_columns(fields: dict[str, Any], columns: tuple[str, ...] | None, *, location: str) -> None:
    for column in columns or ():
        if column not in fields:
            keys = ", ".join(map(repr, fields)) or "none"
            raise DataError(f"{location}: no key {column!r} (data.text_key); the keys are: {keys}")


def _read_parquet(file: SourceFile, *, columns: tuple[str, ...] | None) -> Iterator[Record]:
    # 0.1 s of import, paid only by those who read parquet; workers import this module.
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(file) as stream:
        try:
            table = pq.ParquetFile(stream)
            for column in columns or ():
                if column not in table.schema_arrow.names:
                    names = ", ".join(map(repr, table.schema_arrow.names))
                    raise DataError(f"{file.path}: no column {column!r} (data.text_key); the columns are: {names}")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=list(columns) if columns else None):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(name=f"{file.name}:{number}", location=f"{file.path}:{number}", fields=fields)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file.path} is not a readable parquet file: {error}") from None


def json_name(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _not_utf8(location: str, *, offset: int) -> DataError:
    return DataError(f"{location}: not UTF-8 at byte {offset}; convert it, for example with iconv")
