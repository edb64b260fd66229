"""Rank-free coordinates: which elements of which parameter, in which kind, and how a rank's own lie in memory.

An interval is `[start, stop)` of a parameter's flattened elements. A layout is the row of intervals that
one rank owns, packed without holes; the bytes are the same in a snapshot's shared memory and in the data
section of the safetensors file that the snapshot becomes, so saving is copying a header and a row of bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("master", "ema", "frozen", "buffer", "exp_avg", "exp_avg_sq")
"""In the order of a file: what a model is made of first, what only training needs last."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the names that safetensors gives its types."""

Range = tuple[int, memoryview]
"""Bytes of a file: where they begin, and the memory they are to fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Elements `[start, stop)` of one flattened parameter in one kind."""

    kind: str
    name: str
    start: int
    stop: int
    dtype: str
    """As safetensors writes it: `F32`, `BF16`, ..."""

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def key(self) -> str:
        """Its name within a safetensors file; a parameter's name may hold any character."""
        return f"{self.kind}/{self.start}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The intervals of one rank, in the order and at the places in which they lie in memory and in a file."""

    intervals: tuple[Interval, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all intervals."""
        return sum(interval.size_bytes for interval in self.intervals)

    def placed(self) -> Iterator[tuple[Interval, int]]:
        """Every interval with the byte at which it begins."""
        offset = 0
        for interval in self.intervals:
            yield interval, offset
            offset += interval.size_bytes

    def to_record(self) -> list[list[Any]]:
        """As JSON; see `layout_from_record`."""
        return [[i.kind, i.name, i.start, i.stop, i.dtype] for i in self.intervals]


def pack(intervals: Iterable[Interval]) -> Layout:
    """Order intervals by size of element, kind and name, so that each is aligned; empty ones are left out."""
    held = [interval for interval in intervals if interval.numel > 0]
    held.sort(key=lambda i: (-ITEM_BYTES[i.dtype], KINDS.index(i.kind), i.name, i.start))
    return Layout(intervals=tuple(held))


def layout_from_record(record: Iterable[Iterable[Any]]) -> Layout:
    """Read what `Layout.to_record` gave."""
    names = ("kind", "name", "start", "stop", "dtype")
    return Layout(intervals=tuple(Interval(**dict(zip(names, row, strict=True))) for row in record))


class IntervalIndex:
    """What several parts hold together, to be read from by interval."""

    def __init__(self, parts: Iterable[tuple[str, Layout, int]]) -> None:
        """Args:
        parts: name, layout, and the byte at which the first interval begins.
        """
        self._places: dict[tuple[str, str], list[tuple[Interval, str, int]]] = {}
        for name, layout, data_start in parts:
            for interval, offset in layout.placed():
                place = (interval, name, data_start + offset)
                self._places.setdefault((interval.kind, interval.name), []).append(place)

    @property
    def kinds(self) -> set[str]:
        """The kinds that are held of any parameter."""
        return {kind for kind, _ in self._places}

    def ranges(self, wanted: Iterable[tuple[Interval, memoryview]]) -> dict[str, list[Range]]:
        """By part, the ranges of bytes to read and the memory they fill, so that each interval is whole.

        Raises: ValueError if an element is not held, or in another type.
        """
        found: dict[str, list[Range]] = {}
        for interval, view in wanted:
            num_found = 0
            for held, part, offset in self._places.get((interval.kind, interval.name), ()):
                first, last = max(held.start, interval.start), min(held.stop, interval.stop)
                if first >= last:
                    continue
                if held.dtype != interval.dtype:
                    raise ValueError(
                        f"holds {interval.name} ({interval.kind}) as {held.dtype}, not {interval.dtype}"
                    )
                item = ITEM_BYTES[held.dtype]
                target = view[(first - interval.start) * item : (last - interval.start) * item]
                found.setdefault(part, []).append((offset + (first - held.start) * item, target))
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
    """What stands before the data of a safetensors file: the length of a JSON, and the JSON, padded with blanks.

    Args:
        tensors: type and shape by name, in the order in which their bytes follow, without holes.
        metadata: text about the file.
        alignment: bytes of which the data's place in the file is a multiple.

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
