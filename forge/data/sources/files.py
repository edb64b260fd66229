"""Records from files: text, JSON, CSV and Parquet, compressed or not, local or remote.

Files are read pattern by pattern, sorted by path within each pattern; `forge.data.sources.listing` says which,
`forge.data.sources.detect` as what. Text is kept byte for byte, without newline translation; only a UTF-8 byte
order mark is removed. A text file is one record, in pieces if it is long; of the others, each line, element or row.
"""

from __future__ import annotations

import codecs
import csv
import json
import lzma
import shlex
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from forge.config.mixture import FileType
from forge.data.format_hint import format_hint
from forge.data.sources.base import Record
from forge.data.sources.detect import Content, open_content
from forge.data.sources.json_values import MAX_RECORD_CHARS, UnparsedJson, ValueReader, parse_record
from forge.data.sources.listing import Matched, SourceFile, list_files
from forge.data.sources.parquet_batches import batches
from forge.data.sources.pieces import PIECE_CHARS, pieces_of
from forge.data.store import hash_file, new_hash
from forge.errors import DataError, printable
from forge.process import one_line

_REMOTE_IDENTITY = (
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
    "blob_id",
)
"""What the file systems of fsspec call the version of a file."""

_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)

_MAX_KEYS_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """The records of files.

    Args:
        patterns: globs or fsspec URLs.
        file_type: `data.file_type`: what the files are; `auto` finds it out.
        text_key: field that holds the content of a text file.
        columns: fields that every record must have; others are not read where the file type allows it. None: all.
        listed: the files, if they are known already; the patterns do not count then.
    """

    patterns: tuple[str, ...]
    file_type: FileType = "auto"
    text_key: str = "text"
    columns: tuple[str, ...] | None = None
    listed: tuple[Matched, ...] | None = None

    def matched(self) -> Sequence[Matched]:
        """The files of every pattern. Raises: DataError as `list_files`."""
        return self.listed if self.listed is not None else list_files(self.patterns)

    def files(self) -> list[SourceFile]:
        """Every file once, in order. Raises: DataError as `list_files`."""
        return [file for matched in self.matched() for file in matched.files]

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
        return read_records(self.file, source=self.source)


def read_records(file: SourceFile, *, source: FileSource) -> Iterator[Record]:
    """The records of one file. Raises: DataError if it cannot be read, or a record lacks a column."""
    with (
        reading(file),
        open_content(file, file_type=source.file_type, text_key=source.text_key) as (content, stream),
    ):
        yield from _READERS[content.layout](file, stream, content, source)


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Raise what goes wrong while a file is read as a DataError that names it."""
    try:
        yield
    except _UNREADABLE as error:
        raise DataError(f"{file.shown} cannot be read: {error}") from None
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        if file.is_local:
            raise
        what = one_line(error) or type(error).__name__  # every store has error classes of its own
        raise DataError(f"{file.shown} cannot be read: {what}") from error


def fingerprint_of(files: Iterable[SourceFile]) -> str:
    """Digest of the names and the content of files. Raises: DataError if one cannot be read."""
    digest = new_hash()
    for file in files:
        identity = hash_file(Path(file.path)) if file.is_local else _remote_identity(file)
        digest.update(json.dumps([file.name, identity]).encode())
    return digest.hexdigest()


def text_records(file: SourceFile, blocks: Iterable[str], *, text_key: str) -> Iterator[Record]:
    """The text of one file as one record, in pieces; an empty text has none."""
    for piece in pieces_of(blocks):
        fields = {text_key: piece.text}
        yield Record(name=file.name, location=file.shown, fields=fields, starts=piece.starts, ends=piece.ends)


def json_name(value: object) -> str:
    """What JSON calls the type of a value."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    names |= {type(None): "null", int: "a number", float: "a number", UnparsedJson: "a long or deeply nested value"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _remote_identity(file: SourceFile) -> str:
    try:
        info = file.fs.info(file.path)
    except Exception as error:  # every store has error classes of its own
        raise DataError(f"{file.shown} cannot be examined: {one_line(error)}") from None
    known = {key: str(info[key]) for key in ("size", *_REMOTE_IDENTITY) if info.get(key) is not None}
    return json.dumps(known, sort_keys=True)


def _read_text(file: SourceFile, stream: IO[bytes], content: Content, source: FileSource) -> Iterator[Record]:
    return text_records(file, _decode(stream, path=file.shown), text_key=source.text_key)


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


def _read_lines(file: SourceFile, stream: IO[bytes], content: Content, source: FileSource) -> Iterator[Record]:
    number = offset = 0
    shown = file.shown
    while line := stream.readline(MAX_RECORD_CHARS):
        number += 1
        location = f"{shown}:{number}"
        if len(line) == MAX_RECORD_CHARS and not line.endswith(b"\n"):
            raise DataError(f"{location}: the line is longer than {MAX_RECORD_CHARS} bytes")
        if line.strip():
            name = f"{file.name}:{number}"
            try:
                text = _line_text(line, source=source, location=location, offset=offset)
                record = _record(text, name=name, location=location, source=source, what="a line")
            except DataError as error:
                record = _bad_record(error, name=name, location=location)
            yield record
        offset += len(line)


def _line_text(line: bytes, *, source: FileSource, location: str, offset: int) -> str:
    """Decode a line; bytes that are not UTF-8 may be in fields that are not in use."""
    try:
        return line.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        text = line.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
        try:
            fields = parse_record(text, columns=source.columns)
            for column in source.columns or fields:
                json.dumps(fields[column], ensure_ascii=False).encode()
        except (ValueError, TypeError, LookupError, RecursionError):  # UnicodeEncodeError is a ValueError
            raise _not_utf8(location, offset=offset + error.start) from None
        return text


def _read_values(file: SourceFile, stream: IO[bytes], content: Content, source: FileSource) -> Iterator[Record]:
    what = "an element" if content.layout == "array" else "a value"
    shown = file.shown
    for number, text in ValueReader(_decode(stream, path=shown), location=shown):
        name, location = f"{file.name}:{number}", f"{shown}:{number}"
        try:
            record = _record(text, name=name, location=location, source=source, what=what)
        except DataError as error:
            record = _bad_record(error, name=name, location=location)
        yield record


def _record(text: str, *, name: str, location: str, source: FileSource, what: str) -> Record:
    try:
        fields = parse_record(text, columns=source.columns)
    except ValueError as error:
        raise DataError(f"{location}: not {what} of JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{location}: {what} must be a JSON object, this one is {json_name(fields)}")
    _require_columns(fields, source.columns, location=location)
    return Record(name=name, location=location, fields=fields)


def _bad_record(error: DataError, *, name: str, location: str) -> Record:
    return Record(name=name, location=location, fields={}, problem=str(error))


def _require_columns(fields: dict[str, Any], columns: tuple[str, ...] | None, *, location: str) -> None:
    for column in columns or ():
        if column not in fields:
            problem = f"no key {column!r} (data.text_key); the keys are: {_listed(fields)}"
            raise DataError(f"{location}: {problem}{_advice(fields)}")


def _advice(fields: dict[str, Any]) -> str:
    """What to do about an object of another format, or one whose records are in one of its fields."""
    if hint := format_hint(fields, given="text"):
        return hint
    for key, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            query = printable(shlex.quote(f".[{json.dumps(key)}][]"), limit=100)
            return f"; if its records are in {printable(repr(key), limit=80)}, write them one a line: jq -c {query}"
    return ""


def _read_csv(file: SourceFile, stream: IO[bytes], content: Content, source: FileSource) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_CHARS)
    rows = csv.reader(_split_lines(_decode(stream, path=file.shown)), delimiter=content.delimiter, strict=True)
    header = next(_rows(rows, file=file), [])
    if len(set(header)) < len(header):
        raise DataError(f"{file.shown}: two columns have the same name; the columns are: {_listed(header)}")
    for column in source.columns or ():
        if column not in header:
            raise _no_column(file, column, header)
    shown = file.shown
    for row in _rows(rows, file=file):
        name, location, problem = f"{file.name}:{rows.line_num}", f"{shown}:{rows.line_num}", ""
        if len(row) != len(header):
            problem = (
                f"{location}: the row has {len(row)} columns, the header {len(header)}; put values that contain "
                f"{content.delimiter!r} in quotation marks"
            )
        fields = {} if problem else dict(zip(header, row, strict=True))
        yield Record(name=name, location=location, fields=fields, problem=problem)


def _rows(rows: Any, *, file: SourceFile) -> Iterator[list[str]]:
    """The rows that are not empty. `rows` is a reader of the csv module."""
    try:
        yield from filter(None, rows)
    except csv.Error as error:
        raise DataError(f"{file.shown}:{rows.line_num}: not a row of CSV: {error}") from None


def _split_lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their ends; a very long one comes in parts, which the csv module joins again."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
        if len(rest) > MAX_RECORD_CHARS:
            raise csv.Error(f"the line is longer than {MAX_RECORD_CHARS} characters")
    if rest:
        yield rest


def _read_parquet(file: SourceFile, stream: IO[bytes], content: Content, source: FileSource) -> Iterator[Record]:
    # 0.1 s of import, paid only by those who read parquet; workers import this module.
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not stream.seekable():
        raise DataError(f"{file.shown} is a compressed Parquet file; decompress it")
    columns = list(source.columns) if source.columns else None
    shown = file.shown
    try:
        table = pq.ParquetFile(stream)
        for column in columns or ():
            if column not in table.schema_arrow.names:
                raise _no_column(file, column, table.schema_arrow.names)
        number = 0
        for batch in batches(table, stream, columns=columns):
            for fields in _rows_of(batch):
                number += 1
                yield Record(name=f"{file.name}:{number}", location=f"{shown}:{number}", fields=fields)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{file.shown} is not a readable parquet file: {printable(str(error), limit=300)}"
        ) from None


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch of Arrow; a value that Python cannot hold, such as a date in the year 20,000, is None."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError, LookupError):
        columns = [[_python_value(value) for value in column] for column in batch.columns]
        rows = [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]
    return rows


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError, LookupError):
        return None


def _no_column(file: SourceFile, column: str, names: Sequence[str]) -> DataError:
    return DataError(f"{file.shown}: no column {column!r} (data.text_key); the columns are: {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    known = [printable(repr(name), limit=80) for name in names]
    more = f" and {len(known) - _MAX_KEYS_SHOWN} more" if len(known) > _MAX_KEYS_SHOWN else ""
    return (", ".join(known[:_MAX_KEYS_SHOWN]) or "none") + more


def _not_utf8(location: str, *, offset: int) -> DataError:
    return DataError(f"{location}: not UTF-8 at byte {offset}; convert it, for example with iconv")


_READERS = {
    "text": _read_text,
    "lines": _read_lines,
    "array": _read_values,
    "objects": _read_values,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
