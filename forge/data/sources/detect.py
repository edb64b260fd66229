"""What a file contains, by its content first and its name second: how it is read, or why it is refused.

The compression is recognised by content alone. What cannot be read as documents (archives, pointers of Git LFS,
notebooks, pictures, other binary formats) is refused with the way to convert it; nothing is taken as text only
because its name is unknown.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from forge.config.mixture import FileType
from forge.data.sources.json_values import find_end
from forge.data.sources.listing import SourceFile
from forge.errors import DataError

HEAD_BYTES = 1 << 16
"""How much of a file decides what it is."""

Layout = Literal["text", "lines", "array", "objects", "csv", "parquet"]

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x5d\x00\x00": "xz",  # the older .lzma
}
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_COMPRESSED_NAMES = re.compile(r"\.(?:gz|gzip|bz2|xz|lzma|zst|zstd|lz4)$")

_JSON = (".json", ".jsonl", ".ndjson", ".jsonlines", ".ldjson")
_CSV = (".csv", ".tsv", ".tab")
_PARQUET = (".parquet", ".pq", ".parq")
_ARRAY_OF_OBJECTS = re.compile(r'\[\s*+\{\s*+"')

_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"
_MAX_CONTROL = 0.1
"""Largest share of control characters in a text."""

_TAR = "an archive; unpack it (tar -xf FILE) and name the files in it"
_ZIP = "an archive; unpack it (unzip FILE) and name the files in it"
_SEVEN = "an archive; unpack it (7z x FILE) and name the files in it"
_WEIGHTS = "a file of weights or arrays, not text; leave it out of data.files"
_MEDIA = "a picture, sound or film, not text; leave it out of data.files"
_PROGRAM = "a program, not text; leave it out of data.files"
_ARROW = "an Arrow file; convert it: datasets.Dataset.from_file(FILE).to_parquet(NEW)"
_TABLE = "a table in a format that is not read; convert it to Parquet or JSON lines"
_OFFICE = "a document of an office program; convert it to text, for example with pandoc or pdftotext"
_OTHER_COMPRESSION = "compressed in a way that is not read; recompress it with gzip or zstd"
_SIDE_FILE = "a side file of macOS, not the file itself; delete it"
_UNFINISHED = "an unfinished download; finish it or delete it"

_REFUSED_CONTENT: Mapping[bytes, str] = {
    b"PK\x03\x04": _ZIP, b"PK\x05\x06": _ZIP, b"7z\xbc\xaf\x27\x1c": _SEVEN, b"Rar!\x1a\x07": _SEVEN,
    b"\x1f\x9d": _OTHER_COMPRESSION, b"\xff\x06\x00\x00sNaPpY": _OTHER_COMPRESSION,
    b"\xff\xfe\x00\x00": "UTF-32; convert it: iconv -f UTF-32 -t UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32; convert it: iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\x00\x05\x16\x07": _SIDE_FILE, b"\x00\x00\x00\x01Bud1": _SIDE_FILE,
    b"ARROW1": _ARROW, b"\xff\xff\xff\xff": _ARROW,
    b"PARE": "an encrypted Parquet file; decrypt it first",
    b"Obj\x01": _TABLE, b"ORC": _TABLE, b"SQLite format 3\x00": _TABLE,
    b"%PDF-": _OFFICE, b"{\\rtf": _OFFICE, b"\xd0\xcf\x11\xe0": _OFFICE,
    b"\x89PNG": _MEDIA, b"\xff\xd8\xff": _MEDIA, b"GIF89a": _MEDIA, b"RIFF": _MEDIA, b"OggS": _MEDIA,
    b"fLaC": _MEDIA, b"ID3": _MEDIA, b"\x7fELF": _PROGRAM, b"MZ\x90\x00": _PROGRAM,
    b"\x89HDF": _WEIGHTS, b"\x93NUMPY": _WEIGHTS, b"GGUF": _WEIGHTS,
    b"\x80\x02": _WEIGHTS, b"\x80\x03": _WEIGHTS, b"\x80\x04": _WEIGHTS, b"\x80\x05": _WEIGHTS,
}  # fmt: skip

_REFUSED_NAMES: Mapping[str, str] = {
    ".tar": _TAR, ".tgz": _TAR, ".tbz": _TAR, ".tbz2": _TAR, ".txz": _TAR, ".tzst": _TAR,
    ".zip": _ZIP, ".7z": _SEVEN, ".rar": _SEVEN,
    ".z": _OTHER_COMPRESSION, ".br": _OTHER_COMPRESSION, ".snappy": _OTHER_COMPRESSION,
    ".arrow": _ARROW, ".feather": _ARROW, ".avro": _TABLE, ".orc": _TABLE, ".tfrecord": _TABLE, ".xls": _OFFICE,
    ".warc": "a web archive; extract its text to JSON lines, for example with trafilatura",
    ".ipynb": "a notebook; convert it: jupyter nbconvert --to script",
    ".pdf": _OFFICE, ".doc": _OFFICE, ".docx": _OFFICE, ".xlsx": _OFFICE, ".odt": _OFFICE, ".epub": _OFFICE,
    ".pt": _WEIGHTS, ".pth": _WEIGHTS, ".pkl": _WEIGHTS, ".npy": _WEIGHTS, ".npz": _WEIGHTS, ".gguf": _WEIGHTS,
    ".safetensors": _WEIGHTS, ".part": _UNFINISHED, ".crdownload": _UNFINISHED, ".incomplete": _UNFINISHED,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """How a file is read."""

    layout: Layout
    compression: str | None = None
    delimiter: str = ","

    @property
    def kind(self) -> str:
        """For people: `JSON lines, gzip`."""
        names = {
            "text": "text",
            "lines": "JSON lines",
            "array": "JSON array",
            "objects": "JSON objects",
            "csv": "TSV" if self.delimiter == "\t" else "CSV",
            "parquet": "Parquet",
        }
        return names[self.layout] + (f", {self.compression}" if self.compression else "")


@contextmanager
def open_content(file: SourceFile, *, file_type: FileType, text_key: str) -> Iterator[tuple[Content, IO[bytes]]]:
    """Open a file, decompressed, and decide how it is read.

    Args:
        file_type: `data.file_type`.
        text_key: the field by which lines of JSON are recognised in a file without a telling name.

    Raises: DataError if it cannot be read as documents; OSError and the errors of the decompressors.
    """
    opened = Path(file.path).open("rb") if file.is_local else file.fs.open(file.path, "rb")  # noqa: SIM115
    with opened:
        start, raw = _head_of(opened, num_bytes=16)
        compression = _compression_of(start)
        with _decompressed(raw, compression) as decompressed:
            head, stream = _head_of(decompressed, num_bytes=HEAD_BYTES)
            if compression and _compression_of(head):
                raise DataError(f"{file.shown} is compressed twice; decompress it once")
            name = _plain_name(file.path)
            problem = _problem_of(name, head, is_forced=file_type != "auto")
            if problem:
                raise DataError(f"{file.shown} is {problem}")
            layout = _layout_of(name, head, file_type=file_type, text_key=text_key)
            delimiter = _delimiter_of(name, head) if layout == "csv" else ","
            yield Content(layout=layout, compression=compression, delimiter=delimiter), stream


def _head_of(stream: IO[bytes], *, num_bytes: int) -> tuple[bytes, IO[bytes]]:
    """The first bytes of a stream, and the stream from its beginning."""
    head = b""
    while len(head) < num_bytes and (more := stream.read(num_bytes - len(head))):
        head += more
    try:
        stream.seek(0)
    except (OSError, ValueError):  # of a web server without ranges, or decompressed by Arrow
        return head, io.BufferedReader(_Prefixed(head, stream), buffer_size=1 << 20)
    return head, stream


class _Prefixed(io.RawIOBase):
    """A stream that cannot go back, with the bytes that were read from it in front again."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        taken = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._rest.close()
        super().close()


def _compression_of(start: bytes) -> str | None:
    if _BZIP2.match(start):
        return "bzip2"
    if _ZSTD_SKIPPABLE.match(start):
        return "zstd"
    return next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)


def _decompressed(raw: IO[bytes], compression: str | None) -> IO[bytes]:
    """All members or frames of a compressed stream, one after the other; one that is cut short raises an error."""
    match compression:
        case None:
            return raw
        case "gzip":
            return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        case "bzip2":
            return cast(IO[bytes], bz2.BZ2File(raw))
        case "xz":
            return cast(IO[bytes], lzma.LZMAFile(raw))
    import pyarrow as pa  # 0.1 s of import, paid only by those who need it

    return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression))


def _plain_name(path: str) -> str:
    """The file name in small letters, without the query of a URL and the suffix of a compression."""
    name = path.partition("?")[0] if "://" in path else path
    return _COMPRESSED_NAMES.sub("", name.rpartition("/")[2].lower())


def _problem_of(name: str, head: bytes, *, is_forced: bool) -> str | None:
    """Why a file cannot be read as documents: a noun phrase with the advice; None if it can."""
    if _is_pointer(head):
        return "a pointer of Git LFS or git-annex, not the file itself; fetch it: git lfs pull, or git annex get"
    for magic, problem in _REFUSED_CONTENT.items():
        # Magic words of letters could also be the first word of a text.
        if head.startswith(magic) and (b"\0" in head or not magic.isalnum()):
            return problem
    if head[257:262] == b"ustar":
        return _TAR
    if head.startswith(b"PAR1"):
        return None
    num_control = len(head) - len(head.translate(None, delete=_CONTROL))
    is_binary = num_control > _MAX_CONTROL * len(head)
    if not is_forced:
        named = next((problem for suffix, problem in _REFUSED_NAMES.items() if name.endswith(suffix)), None)
        if named:
            return named + ("" if is_binary else "; to read it as it is, set data.file_type: text")
    if is_binary:
        return "binary, not text (or UTF-16 without a mark); convert it to UTF-8 text, JSON lines, CSV or Parquet"
    return None


def _is_pointer(head: bytes) -> bool:
    return len(head) < 1024 and head.startswith((b"version https://git-lfs.github.com/", b"/annex/objects/"))


def _layout_of(name: str, head: bytes, *, file_type: FileType, text_key: str) -> Layout:
    if file_type == "text" or file_type == "csv" or file_type == "parquet":
        return file_type
    if head.startswith(b"PAR1") or (file_type == "auto" and name.endswith(_PARQUET)):
        return "parquet"
    if file_type == "json" or name.endswith(_JSON):
        return _json_layout(head)
    if name.endswith(_CSV):
        return "csv"
    return _json_layout(head) if _is_json_records(head, text_key=text_key) else "text"


def _json_layout(head: bytes) -> Layout:
    """Objects one a line; the elements of an array; or objects that extend over several lines."""
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        return "array" if text[1:].lstrip(" \t\r")[:1] in ("{", "\n", "") else "lines"
    first, newline, _ = text.partition("\n")
    return "objects" if newline and text.startswith("{") and find_end(first, 0) is None else "lines"


def _is_json_records(head: bytes, *, text_key: str) -> bool:
    """Whether a file whose name does not say so holds records of JSON."""
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        return bool(_ARRAY_OF_OBJECTS.match(text)) and json.dumps(text_key, ensure_ascii=False) in text
    if not text.startswith("{"):
        return False
    lines = [line for line in text.split("\n")[:-1] or [text] if line.strip()]
    records = [_object_in(line) for line in lines[:2]]
    return None not in records and (text_key in (records[0] or {}) or len(records) > 1)


def _object_in(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _delimiter_of(name: str, head: bytes) -> str:
    """What separates the columns: of the usual characters the one that the header line has most of."""
    if name.endswith((".tsv", ".tab")):
        return "\t"
    header = head.decode("utf-8-sig", errors="replace").lstrip().partition("\n")[0]
    return max(",;\t|", key=header.count)
