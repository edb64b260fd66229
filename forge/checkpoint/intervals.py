"""Rank-independent coordinates of the training state: intervals of parameters, and their layout in memory.

An interval is `[start, stop)` of a parameter's flattened elements, in one kind. A layout is the sequence of
intervals that one rank owns, packed without gaps. The bytes are the same in a snapshot in shared memory and in the
data section of the safetensors file, so writing a part means writing a header and one block of memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from forge.foreign import MAX_INT

OPTIMIZER_KINDS = (
    "exp_avg", "exp_avg_sq", "momentum_buffer", "variance", "row_var", "col_var",
    "exp_avg_8bit", "exp_avg_sq_8bit", "exp_avg_absmax", "exp_avg_sq_absmax",
)  # fmt: skip
"""State of optimizers, by torch's names; `absmax` are the scales of 8-bit states, by bitsandbytes' name."""

KINDS = ("master", "ema", "frozen", "buffer", *OPTIMIZER_KINDS)
"""In the order of a file: first the values of the model, last what only training needs."""

_BLOCK_8BIT = 256

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors type name."""

Range = tuple[int, memoryview]
"""Offset in a file, and the memory to fill from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Elements `[start, stop)` of one flattened parameter in one kind."""

    kind: str
    name: str
    start: int
    stop: int
    dtype: str
    """Safetensors type name: `F32`, `BF16`, ..."""

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def size_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def key(self) -> str:
        """Key of the tensor in a safetensors file; the parameter name comes last, as it may contain slashes."""
        return f"{self.kind}/{self.start}/{self.name}"


def kind_numel(kind: str, shape: tuple[int, ...]) -> int:
    """Return the number of elements that a parameter has in one kind; their order is that of the parameter.

    `row_var` and `col_var` have one for each row or column of each matrix in the last two dimensions, `absmax` one
    for each 256 elements, all others one for each element.
    """
    numel = math.prod(shape)
    if kind in ("row_var", "col_var"):
        return numel // shape[-1 if kind == "row_var" else -2] if len(shape) >= 2 and numel else 0
    return -(-numel // _BLOCK_8BIT) if kind.endswith("_absmax") else numel


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The intervals of one rank, in their order in memory and in a file."""

    intervals: tuple[Interval, ...]

    @property
    def size_bytes(self) -> int:
        return sum(interval.size_bytes for interval in self.intervals)

    def with_offsets(self) -> Iterator[tuple[Interval, int]]:
        """Yield each interval with its byte offset."""
        offset = 0
        for interval in self.intervals:
            yield interval, offset
            offset += interval.size_bytes

    def to_record(self) -> list[list[Any]]:
        """Return the layout as JSON; see `layout_from_record`."""
        return [[i.kind, i.name, i.start, i.stop, i.dtype] for i in self.intervals]


def pack(intervals: Iterable[Interval]) -> Layout:
    """Sort intervals by element size, kind and name, so that each is aligned; empty ones are dropped."""
    stored = [interval for interval in intervals if interval.numel > 0]
    stored.sort(key=lambda i: (-ITEM_BYTES[i.dtype], KINDS.index(i.kind), i.name, i.start))
    return Layout(intervals=tuple(stored))


def layout_from_record(record: Any) -> Layout:
    """Parse the output of `Layout.to_record`. Raises: ValueError if it is not valid."""
    if not isinstance(record, list):
        raise ValueError("the intervals of a part are not a list")
    return Layout(intervals=tuple(_interval_from_record(row) for row in record))


def _interval_from_record(row: Any) -> Interval:
    try:
        kind, name, start, stop, dtype = row
        is_valid = (
            type(start) is type(stop) is int
            and 0 <= start <= stop < MAX_INT
            and isinstance(name, str)
            and kind in KINDS
            and dtype in ITEM_BYTES
        )
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{row!r:.120} is no interval")
    return Interval(kind=kind, name=name, start=start, stop=stop, dtype=dtype)


class IntervalIndex:
    """Finds the byte ranges of any interval in several parts."""

    def __init__(self, parts: Iterable[tuple[str, Layout, int]]) -> None:
        """Args:
        parts: name, layout, and offset of the first interval in the file, in bytes.
        """
        self._locations: dict[tuple[str, str], list[tuple[Interval, str, int]]] = {}
        for name, layout, data_start in parts:
            self.add(name, layout, data_start=data_start)

    def add(self, part: str, layout: Layout, *, data_start: int) -> None:
        """Add a part, whose first interval is `data_start` bytes after the start of its file."""
        for interval, offset in layout.with_offsets():
            location = (interval, part, data_start + offset)
            self._locations.setdefault((interval.kind, interval.name), []).append(location)

    def covers(self, wanted: Interval) -> bool:
        """Return whether the parts so far hold every element of an interval."""
        stored = self._locations.get((wanted.kind, wanted.name), ())
        overlaps = (min(of.stop, wanted.stop) - max(of.start, wanted.start) for of, _, _ in stored)
        return sum(numel for numel in overlaps if numel > 0) >= wanted.numel

    @property
    def kinds(self) -> set[str]:
        """All kinds that are stored."""
        return {kind for kind, _ in self._locations}

    def ranges(self, wanted: Iterable[tuple[Interval, memoryview]]) -> dict[str, list[Range]]:
        """Map each part to the byte ranges to read from it, so that every wanted interval is filled completely.

        Raises: ValueError if an element is not stored, or is stored in another type.
        """
        found: dict[str, list[Range]] = {}
        for interval, view in wanted:
            num_found = 0
            for stored, part, offset in self._locations.get((interval.kind, interval.name), ()):
                first, last = max(stored.start, interval.start), min(stored.stop, interval.stop)
                if first >= last:
                    continue
                if stored.dtype != interval.dtype:
                    raise ValueError(
                        f"holds {interval.name} ({interval.kind}) as {stored.dtype}, not {interval.dtype}"
                    )
                item = ITEM_BYTES[stored.dtype]
                target = view[(first - interval.start) * item : (last - interval.start) * item]
                found.setdefault(part, []).append((offset + (first - stored.start) * item, target))
                num_found += last - first
            if num_found != interval.numel:
                raise ValueError(
                    f"holds {num_found} of the {interval.numel} elements {interval.start}..{interval.stop} "
                    f"of {interval.name} ({interval.kind}): it belongs to another model"
                )
        return found


def safetensors_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] | None = None,
    alignment: int = 8,
) -> bytes:
    """Return the header of a safetensors file: 8 bytes with the length of a JSON, and the JSON, padded with spaces.

    Args:
        tensors: type and shape by name, in the order of their bytes, which follow without gaps.
        metadata: text entries of `__metadata__`.
        alignment: the data starts at a multiple of this many bytes.

    Source: https://huggingface.co/docs/safetensors/index#format
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text
