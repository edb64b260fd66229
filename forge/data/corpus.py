"""Raw text, document by document, from any place, in an order that never changes.

In: the `data:` section. Out: a stream of documents. Memory does not grow with the corpus: files are
read block by block, and a document of more than 2²⁰ characters comes in pieces, cut at the end of a line
and where no tokenizer would join what is cut. Empty documents are left out.

Files are taken pattern by pattern, sorted by path within each. Text stays as it is, byte for byte: no
newline translation; only a UTF-8 byte order mark is dropped.
"""

from __future__ import annotations

import codecs
import json
import logging
import lzma
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from forge.config.data import DataSpec
from forge.data.store import hash_file, new_hash
from forge.errors import DataError

PIECE_CHARS = 1 << 20
"""Longest text handed on at once; also the block in which files are read."""

_MAX_LINE_BYTES = 1 << 28
"""A .jsonl line is parsed whole; one longer than 256 MiB is a file of another kind."""

_STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "turtledemo", "tkinter"}
    | {"lib2to3", "distutils", "ensurepip"}
)
"""Third-party code, and what some distributions and releases of Python lack (Debian moves the test suites,
idlelib and tkinter to packages of their own; 3.12 dropped distutils, 3.13 lib2to3). What remains, 10.0 MB
in 513 files of CPython 3.11.7, is nearly the same text on every machine with the same Python."""

_CODEC_PACKAGES = {".zst": "zstandard", ".zstd": "zstandard", ".lz4": "lz4", ".snappy": "python-snappy"}
"""Compressions that fsspec knows only when another package is there."""

_REMOTE_IDENTITY = ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "last_modified", "mtime", "created")
"""What the file systems of fsspec call the version of a file."""

_CUTS = (re.compile(r"[^\W_](?=\n)"), re.compile(r"\S(?=\n)"), re.compile(r"\S(?= )"))
"""Every word pattern in use ends a word at the first (GPT-2's at all three), so cutting there changes no id."""

_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document, or a piece of a long one.

    `name` is the file and, where it holds many, the line or row counted from 1: `books.jsonl:17`.
    """

    name: str
    text: str
    starts: bool = True
    """Whether this is the first piece of its document."""
    ends: bool = True
    """Whether this is the last piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of the corpus. `name` is the path below the pattern's fixed part, `path` where it lies."""

    fs: Any
    path: str
    name: str
    kind: Literal["text", "jsonl", "parquet", "python"]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)


def iter_documents(spec: DataSpec) -> Iterator[Document]:
    """Stream the corpus; pieces of one document follow each other.

    Raises: DataError for a pattern without a match, an unreadable or malformed file, a missing text key,
        text that is not a string or not UTF-8, or a corpus without any text.
    """
    is_empty = True
    for file in find_files(spec):
        for document in _documents_of(file, text_key=spec.text_key):
            is_empty = False
            yield document
    if is_empty:
        raise DataError(f"the corpus has no text: every file of {_origin(spec)} is empty")


def iter_sample(spec: DataSpec, *, max_chars: int, max_files: int = 1024) -> Iterator[str]:
    """At most `max_chars` characters, spread evenly: the beginnings of up to `max_files` files.

    What a short file leaves over goes to those after it, so a corpus within the bounds is read whole.

    Raises: DataError as `iter_documents`.
    """
    files = find_files(spec)
    chosen = [files[i * len(files) // max_files] for i in range(max_files)] if len(files) > max_files else files
    left = max_chars
    for number, file in enumerate(chosen):
        quota = left // (len(chosen) - number)
        for document in _documents_of(file, text_key=spec.text_key):
            text = document.text[:quota]
            quota -= len(text)
            left -= len(text)
            yield text
            if quota <= 0:
                break


def find_files(spec: DataSpec) -> list[SourceFile]:
    """Every file of the corpus once, in corpus order.

    Raises: DataError for a pattern that matches no file, naming it and where it was looked for.
    """
    if spec.files is None:
        return _stdlib_files()
    found: dict[tuple[int, str], SourceFile] = {}
    for pattern in spec.files:
        for file in _match(pattern):
            found.setdefault((id(file.fs), file.path), file)  # fsspec keeps one instance per file system
    return list(found.values())


def fingerprint(spec: DataSpec) -> str:
    """Digest of what the corpus contains, 32 hex digits.

    Local files count with name and content, so a moved folder is still the same corpus. Remote files
    count with name, size and what the store gives as identity (etag, checksum or time of change).

    Raises: DataError as `find_files`, or if a file cannot be read.
    """
    digest = new_hash()
    for file in find_files(spec):
        identity = hash_file(Path(file.path)) if file.is_local else _remote_identity(file)
        digest.update(json.dumps([file.name, identity]).encode())
    return digest.hexdigest()


def _origin(spec: DataSpec) -> str:
    return f"data.files {', '.join(spec.files)}" if spec.files else f"data.source {spec.source}"


def _stdlib_files() -> list[SourceFile]:
    root = sysconfig.get_paths()["stdlib"]
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]
        prefix = Path(folder).relative_to(root)
        # _sysconfigdata_* and sitecustomize are written by whoever built or packaged this Python.
        names += [
            (prefix / name).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize"))
        ]
    if not names:
        raise DataError(f"data.source: python-stdlib: no Python sources below {root}; use data.files instead")
    fs = LocalFileSystem()
    return [SourceFile(fs=fs, path=f"{root}/{name}", name=name, kind="python") for name in sorted(names)]


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


def _documents_of(file: SourceFile, *, text_key: str) -> Iterator[Document]:
    """The documents of one file, in pieces; whatever fails while reading it becomes a DataError."""
    readers: dict[str, Callable[[], Iterable[tuple[str, Iterable[str]]]]] = {
        "text": lambda: _read_text(file),
        "jsonl": lambda: _read_jsonl(file, text_key=text_key),
        "parquet": lambda: _read_parquet(file, text_key=text_key),
        "python": lambda: _read_python(file),
    }
    try:
        for name, blocks in readers[file.kind]():
            yield from _pieces(name, blocks)
    except _UNREADABLE as error:
        raise DataError(f"{file.path} cannot be read: {error}") from None


def _pieces(name: str, blocks: Iterable[str]) -> Iterator[Document]:
    rest = ""
    starts = True
    for block in blocks:
        rest += block
        while len(rest) > PIECE_CHARS:
            cut = _find_cut(rest)
            yield Document(name=name, text=rest[:cut], starts=starts, ends=False)
            rest, starts = rest[cut:], False
    if rest:
        yield Document(name=name, text=rest, starts=starts, ends=True)


def _find_cut(text: str) -> int:
    """Where to cut, at most PIECE_CHARS in: before the last line break after a letter or digit.

    Else before one after any visible character, else before a space after one, else anywhere.
    """
    for pattern in _CUTS:
        # Look at the end first: the last 64 Ki characters nearly always have such a place.
        for start in (PIECE_CHARS - (1 << 16), 0):
            ends = [found.end() for found in pattern.finditer(text, max(0, start), PIECE_CHARS + 1)]
            if ends:
                return ends[-1]
    return PIECE_CHARS


def _open(file: SourceFile) -> IO[bytes]:
    name = file.path.partition("?")[0] if "://" in file.path else file.path
    package = _CODEC_PACKAGES.get(Path(name).suffix)
    compression = infer_compression(name)
    if package and not compression:
        raise DataError(f"{file.path} is compressed; to unpack it: pip install {package}")
    opened: IO[bytes] = file.fs.open(file.path, "rb", compression=compression)
    return opened


def _read_text(file: SourceFile) -> Iterator[tuple[str, Iterable[str]]]:
    with _open(file) as stream:
        yield file.name, _decode(stream, path=file.path)


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


def _read_jsonl(file: SourceFile, *, text_key: str) -> Iterator[tuple[str, Iterable[str]]]:
    with _open(file) as stream:
        number = offset = 0
        while line := stream.readline(_MAX_LINE_BYTES):
            number += 1
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise DataError(f"{file.path}:{number}: the line is longer than {_MAX_LINE_BYTES} bytes")
            if line.strip():
                text = _text_of_line(line, place=f"{file.path}:{number}", text_key=text_key, offset=offset)
                yield f"{file.name}:{number}", _blocks(text)
            offset += len(line)


def _text_of_line(line: bytes, *, place: str, text_key: str, offset: int) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(place, offset=offset + error.start) from None
    except ValueError as error:
        raise DataError(f"{place}: not a line of JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: a line must be a JSON object, this one is {_json_name(record)}")
    if text_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{place}: no key {text_key!r} (data.text_key); the keys are: {keys}")
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(f"{place}: {text_key!r} must be a string, it is {_json_name(text)}")
    return _checked(text, place=place)


def _read_parquet(file: SourceFile, *, text_key: str) -> Iterator[tuple[str, Iterable[str]]]:
    # 0.1 s of import that only those who read parquet pay; ranks import this module.
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(file) as stream:
        try:
            table = pq.ParquetFile(stream)
            if text_key not in table.schema_arrow.names:
                columns = ", ".join(map(repr, table.schema_arrow.names))
                raise DataError(f"{file.path}: no column {text_key!r} (data.text_key); the columns are: {columns}")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    place = f"{file.path}:{number}"
                    if not isinstance(text, str):
                        kind = batch.schema.field(0).type if text is not None else "null"
                        raise DataError(f"{place}: column {text_key!r} must hold strings, this row is {kind}")
                    yield f"{file.name}:{number}", _blocks(text)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file.path} is not a readable parquet file: {error}") from None


def _read_python(file: SourceFile) -> Iterator[tuple[str, Iterable[str]]]:
    try:
        with tokenize.open(file.path) as stream:  # honours the coding line
            text = stream.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        _log.info("left out %s, which does not decode: %s", file.path, error)
        return
    yield file.name, _blocks(text)


def _blocks(text: str) -> Iterator[str]:
    return (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))


def _checked(text: str, *, place: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and has no UTF-8."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        problem = f"half a surrogate pair at character {error.start}"
        raise DataError(f"{place}: the text is not valid Unicode: {problem}") from None
    return text


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _not_utf8(place: str, *, offset: int) -> DataError:
    return DataError(f"{place}: not UTF-8 at byte {offset}; convert it, for example with iconv")
