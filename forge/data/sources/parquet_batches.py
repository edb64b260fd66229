"""Read Parquet in batches of bounded memory.

A dictionary of one long value, which compresses to a few bytes, stands for that value in every row: a file of 500
bytes can have gigabytes in each batch. So batches have fewer rows where the dictionary has long values.

Source: https://github.com/apache/parquet-format, PageHeader in parquet.thrift; Thrift compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

_MOST_ROWS = 256
_MOST_BYTES = 1 << 29
"""Of one column in one batch; writers limit their dictionaries to about 1 MiB."""
_HEADER_BYTES = 64
_DICTIONARY_PAGE = 2
_INT32_FIELD = 0x15  # compact protocol: the next field, of the type i32
_BYTE_ARRAYS = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_PREFIX_ENCODING = "DELTA_BYTE_ARRAY"
"""Each value repeats the beginning of the one before it."""


def batches(table: Any, stream: IO[bytes], *, columns: Sequence[str] | None) -> Iterator[Any]:
    """Yield the batches of a `pyarrow.parquet.ParquetFile`, in order.

    Args:
        stream: what it reads from; between batches its position may change.
        columns: the only ones to read; None: all.
    """
    wanted = None if columns is None else list(columns)
    for number in range(table.num_row_groups):
        size = _rows_at_once(stream, table.metadata.row_group(number), columns=wanted)
        yield from table.iter_batches(batch_size=size, columns=wanted, row_groups=[number])


def _rows_at_once(stream: IO[bytes], group: Any, *, columns: Sequence[str] | None) -> int:
    longest = 1
    for number in range(group.num_columns):
        chunk = group.column(number)
        path = chunk.path_in_schema
        is_read = columns is None or any(path == name or path.startswith(f"{name}.") for name in columns)
        if is_read and chunk.physical_type in _BYTE_ARRAYS:
            longest = max(longest, _longest_value(stream, chunk))
    return max(1, min(_MOST_ROWS, _MOST_BYTES // longest))


def _longest_value(stream: IO[bytes], chunk: Any) -> int:
    """The most bytes that a value can have which is stored once for many rows; 0 if there is none."""
    if _PREFIX_ENCODING in chunk.encodings:
        return int(chunk.total_uncompressed_size)
    stream.seek(min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0))
    header = stream.read(_HEADER_BYTES)
    try:
        kind, at = _int32(header, 0)
        num_bytes, _ = _int32(header, at)
    except (ValueError, IndexError):
        return int(chunk.total_uncompressed_size)
    return num_bytes if kind == _DICTIONARY_PAGE else 0


def _int32(header: bytes, at: int) -> tuple[int, int]:
    """Read the next field: its value, and where the one after it begins. Raises: ValueError, IndexError."""
    if header[at] != _INT32_FIELD:
        raise ValueError("not the next field, or no i32")
    value = shift = 0
    while True:
        at += 1
        value |= (header[at] & 0x7F) << shift
        shift += 7
        if header[at] < 0x80:
            return (value >> 1) ^ -(value & 1), at + 1
