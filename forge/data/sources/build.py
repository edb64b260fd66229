"""Build the source of a job: a registered one by its name, or `data.files`; all of it, or a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

from forge.config.data import DataSpec
from forge.data.sources.base import Record, Source
from forge.data.sources.dataset import list_dataset
from forge.data.sources.files import FileSource
from forge.data.sources.registry import SOURCES
from forge.user_code import load_builtin_class


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSize:
    """How much of a source is read at most."""

    num_records: int
    num_chars: int
    """Of their fields, written as text."""
    num_parts: int
    """Files or shards that the records are spread over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSource:
    """The first records of some parts of a source; the parts are chosen evenly."""

    source: Source
    size: SampleSize

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def records(self) -> Iterator[Record]:
        return chain.from_iterable(self.parts())

    def parts(self) -> Sequence[Iterable[Record]]:
        parts, most = self.source.parts(), self.size.num_parts
        chosen = [parts[i * len(parts) // most] for i in range(most)] if len(parts) > most else parts
        return [self._first(part, num_parts=len(chosen)) for part in chosen]

    def _first(self, part: Iterable[Record], *, num_parts: int) -> Iterator[Record]:
        num_records, num_chars = self.size.num_records // num_parts, self.size.num_chars // num_parts
        for number, record in enumerate(part, start=1):
            yield record
            num_chars -= len(str(record.fields))
            if number >= num_records or num_chars <= 0:
                return


def build_source(
    spec: DataSpec, *, columns: tuple[str, ...] | None = None, sample: SampleSize | None = None
) -> Source:
    """Build the source of a job's `data:` section.

    Args:
        columns: fields that every record of a file must have; None reads all.
        sample: how much is read; None: everything.
    """
    source = _whole_source(spec, columns=columns)
    return source if sample is None else SampledSource(source=source, size=sample)


def _whole_source(spec: DataSpec, *, columns: tuple[str, ...] | None) -> Source:
    if spec.source is None:
        return file_source(spec, columns=columns)
    return cast(Source, load_builtin_class(SOURCES[spec.source])(text_key=spec.text_key))


def file_source(spec: DataSpec, *, columns: tuple[str, ...] | None) -> FileSource:
    """Build the source of `data.files` or `data.dataset`. Raises: DataError as `list_dataset`."""
    return FileSource(
        patterns=spec.files or (),
        file_type=spec.file_type,
        text_key=spec.text_key,
        columns=columns,
        listed=(list_dataset(spec),) if spec.dataset is not None else None,
    )
