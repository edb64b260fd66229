"""Prepare examples and rows from records, for `packing: examples` and `packing: none`.

One process reads, formats and writes. The layout counts by reason what was split or dropped.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.config.data import DataSpec
from forge.data.bad_records import BadRecords
from forge.data.cache_index import CacheIndex, ExampleLayout, SkippedRecords, SplitSizes
from forge.data.corpus import no_text
from forge.data.example_store import ExampleWriter, write_rows
from forge.data.formats.base import (
    ChatSettings,
    Example,
    ExampleFormat,
    FormatContext,
    LabelSettings,
    PreferenceSettings,
)
from forge.data.formats.build import build_format
from forge.data.label_counts import count_labels
from forge.data.labels import label_settings
from forge.data.lengths import counts_of, lengths_of
from forge.data.noted_records import NotedRecords
from forge.data.packing import pack_rows
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.data.sources.build import SampleSize, build_source
from forge.data.store import FileEntry, document_key
from forge.data.tokenizer import Encoder, TextTokenizer
from forge.data.tokenizer_backend import is_panic
from forge.data.unigram import unigram_perplexity
from forge.errors import DataError, UserCodeError
from forge.foreign import read_file
from forge.user_code import describe_error

_BLOCK = 1 << 16
"""Examples counted at once."""

_MAX_TEMPLATE_BYTES = 1 << 20

_REASONS = _NO_EXAMPLE, _NO_TARGET = "records without an example", "examples of weight 0 dropped"
"""Reasons that forge itself counts."""


@dataclass(slots=True, kw_only=True)
class _Totals:
    """What was read so far."""

    documents: int = 0
    text_bytes: int = 0
    noted: NotedRecords = field(default_factory=NotedRecords)
    """Of `_REASONS`."""


def write_examples(
    spec: DataSpec,
    *,
    folder: Path,
    digest: str,
    tokenizer: TextTokenizer,
    report: Callable[[int, int, int], None],
    sample: SampleSize | None = None,
) -> CacheIndex:
    """Write all examples and the row tables. Returns: the index, without the files of the tokenizer.

    Args:
        report: called with the number of documents, bytes and tokens so far.
        sample: how much of the source is read; None: everything.

    Raises: DataError if a record or an example is not valid, or there is none; UserCodeError; OSError.
    """
    source = build_source(spec, sample=sample)
    labels = None
    if spec.format == "labelled":
        labels = label_settings(spec.labels, source.records(), is_sample=sample is not None)
    context = _context(spec, tokenizer=tokenizer, labels=labels)
    example_format = build_format(spec.format, context=context)
    _counts_of(example_format)  # a wrong class fails before the corpus is read
    writer = ExampleWriter(folder, seq_len=spec.seq_len, vocab_size=tokenizer.vocab_size)
    try:
        bad = BadRecords(action=spec.on_bad_record, is_sample=sample is not None)
        totals = _write_records(
            spec, records=source.records(), writer=writer, example_format=example_format, report=report, bad=bad
        )
        tables = writer.close()
    finally:
        writer.abort()
    bad.close()
    notes = _notes(totals, counts=_counts_of(example_format))
    if not writer.num_examples:
        left_out = {f"records that cannot be used, such as {bad.listed[0]}": bad.count} if bad.count else {}
        places = _places(own=totals.noted, of_format=context.noted)
        first = {reason: f" (the first: {listed[0]})" for reason, listed in places.items()}
        found = ", ".join(
            f"{count:,} {reason}{first.get(reason, '')}" for reason, count in (notes | left_out).items()
        )
        of = "the corpus" if sample is None else "the sample of the corpus"
        raise DataError(f"{of} has no training example ({totals.documents + bad.count:,} records: {found})")
    is_held_out = _choose_held_out(writer.keys, writer.lengths, share=spec.held_out)
    layout, row_tables = _write_layout(spec, folder=folder, writer=writer, is_held_out=is_held_out, notes=notes)
    layout = replace(layout, noted_records=_places(own=totals.noted, of_format=context.noted))
    perplexity = _unigram(
        spec, folder=folder, writer=writer, is_held_out=is_held_out, vocab_size=tokenizer.vocab_size
    )
    index = _index(tokenizer, digest=digest, totals=totals, unigram_perplexity=perplexity)
    skipped = SkippedRecords(count=bad.count, listed=tuple(bad.listed))
    lengths = lengths_of(counts_of(writer.lengths))
    below = _held_out_below(writer.keys, is_held_out=is_held_out)
    index = replace(index, tables=(*tables, *row_tables), examples=layout, skipped=skipped, lengths=lengths)
    index = replace(index, held_out_below=below)
    if labels is None:
        return index
    return replace(index, labels=count_labels(folder, writer, labels=labels, is_held_out=is_held_out))


def _index(
    tokenizer: TextTokenizer, *, digest: str, totals: _Totals, unigram_perplexity: float | None
) -> CacheIndex:
    """Return the index without its files."""
    return CacheIndex(
        digest=digest,
        dtype=tokenizer.dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        num_documents=totals.documents,
        num_text_bytes=totals.text_bytes,
        unigram_perplexity=unigram_perplexity,
        train=(),
        held_out=(),
        tokenizer=(),
    )


def _context(spec: DataSpec, *, tokenizer: TextTokenizer, labels: LabelSettings | None) -> FormatContext:
    encoder = Encoder(tokenizer)
    return FormatContext(
        seq_len=spec.seq_len,
        text_key=spec.text_key,
        eot_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        encode=lambda text: np.frombuffer(encoder.encode([text])[0], dtype=tokenizer.dtype).astype(np.int64),
        tokenizer=tokenizer,
        chat=chat_settings(spec),
        preference=PreferenceSettings(texts=spec.preference.texts),
        labels=labels or LabelSettings(),
        pair=spec.pair,
        embedding=spec.embedding,
    )


def chat_settings(spec: DataSpec) -> ChatSettings:
    """Read `data.chat`. Raises: DataError if the template file cannot be read."""
    if spec.chat.template is None:
        return ChatSettings(turns=spec.chat.turns)
    try:
        content = read_file(Path(spec.chat.template), max_bytes=_MAX_TEMPLATE_BYTES)
        return ChatSettings(turns=spec.chat.turns, template=content.decode())
    except (OSError, ValueError) as error:
        raise DataError(f"data.chat.template: {spec.chat.template} cannot be read: {error}") from None


def _counts_of(example_format: ExampleFormat) -> dict[str, int]:
    """Return what a format has counted.

    Raises: DataError if `counts` fails, or gives anything but whole numbers by reason.
    """
    name = f"{type(example_format).__name__}.counts"
    try:
        given: Any = example_format.counts()
        counts = dict(given.items()) if isinstance(given, Mapping) else None
    except (Exception, SystemExit) as error:
        raise DataError(f"{name}: {describe_error(error, fallback=_last_line(error))}") from error
    if counts is None:
        raise DataError(f"{name} must return a mapping from each reason to a whole number, not {_kind(given)}")
    for reason, count in counts.items():
        if not isinstance(reason, str) or reason in _REASONS:
            raise DataError(f"{name} has the key {reason!r:.100}; it must be text, and none of forge's own reasons")
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 0:
            raise DataError(f"{name} has {count!r:.100} ({_kind(count)}) for {reason!r}; it must be a whole number")
    return {reason: int(count) for reason, count in counts.items()}


def _write_records(
    spec: DataSpec,
    *,
    records: Iterable[Record],
    writer: ExampleWriter,
    example_format: ExampleFormat,
    report: Callable[[int, int, int], None],
    bad: BadRecords,
) -> _Totals:
    totals = _Totals()
    for record in bad.usable(records):
        try:
            _add_record(record, writer=writer, example_format=example_format, spec=spec, totals=totals)
        except _UnusableRecord as error:
            bad.add(str(error))
        if totals.documents % 1000 == 0:
            report(totals.documents, totals.text_bytes, writer.num_tokens)
    if not totals.documents and not bad.count:
        raise no_text(spec)
    return totals


def _notes(totals: _Totals, *, counts: Mapping[str, int]) -> dict[str, int]:
    """What was split or dropped, by reason."""
    return {reason: count for reason, count in (dict(totals.noted.counts) | dict(counts)).items() if count}


def _places(*, own: NotedRecords, of_format: NotedRecords) -> dict[str, tuple[str, ...]]:
    """Where records were cut, dropped or split; those of forge's own reasons only if the format names none."""
    named = set(chain.from_iterable(of_format.listed.values()))
    others = {
        reason: tuple(place for place in places if place not in named) for reason, places in own.listed.items()
    }
    return {**{reason: places for reason, places in others.items() if places}, **of_format.listed}


def _write_layout(
    spec: DataSpec, *, folder: Path, writer: ExampleWriter, is_held_out: NDArray[np.bool_], notes: dict[str, int]
) -> tuple[ExampleLayout, list[FileEntry]]:
    """Write the row tables of both sides. Returns: the layout and the entries of the tables."""
    write = partial(_write_split, spec, folder=folder, writer=writer)
    train, train_tables = write(name="train", chosen=~is_held_out)
    held_out, held_out_tables = write(name="held_out", chosen=is_held_out)
    layout = ExampleLayout(
        seq_len=spec.seq_len,
        packing=spec.packing,
        columns=writer.columns,
        train=train,
        held_out=held_out,
        notes=notes,
        foreign_target=writer.foreign_target,
    )
    return layout, train_tables + held_out_tables


def _write_split(
    spec: DataSpec, *, folder: Path, name: str, chosen: NDArray[np.bool_], writer: ExampleWriter
) -> tuple[SplitSizes, list[FileEntry]]:
    examples = np.flatnonzero(chosen)
    rows = _rows(examples, writer.lengths[examples], spec=spec)
    (folder / name).mkdir()
    sizes = SplitSizes(
        num_rows=len(rows),
        num_examples=len(examples),
        num_tokens=int(writer.lengths[examples].sum()),
        num_targets=int(writer.num_targets[examples].sum()),
    )
    return sizes, write_rows(folder, name=name, rows=rows, examples=writer)


def _add_record(
    record: Record,
    *,
    writer: ExampleWriter,
    example_format: ExampleFormat,
    spec: DataSpec,
    totals: _Totals,
) -> None:
    location = f"{record.location} (format {type(example_format).__name__})"
    # All at first: of a record that turns out to be unusable nothing is written or counted.
    examples = list(_examples_of(record, example_format=example_format, location=location))
    content = record_content(record, text_key=spec.text_key)
    totals.text_bytes += len(content)
    totals.documents += record.starts
    totals.noted.add(_NO_EXAMPLE, record, count=record.starts and not examples)
    key = document_key(content, seed=spec.seed)
    for example in examples:
        weight = getattr(example, "weight", None)
        if isinstance(weight, int | float | np.integer | np.floating) and weight == 0:
            totals.noted.add(_NO_TARGET, record)
        else:
            writer.add(example, key=key, location=location)


def _examples_of(record: Record, *, example_format: ExampleFormat, location: str) -> Iterator[Example]:
    """The examples of a record.

    Raises: _UnusableRecord if the format refuses the record, DataError with the user's line if the format fails.
    """
    try:
        examples: Any = example_format.examples(record)
        is_iterable = isinstance(examples, Iterable)
        if is_iterable:
            yield from examples
    except DataError as error:
        raise _UnusableRecord(str(error)) from error
    except UserCodeError:
        raise
    except BaseException as error:
        if not isinstance(error, (Exception, SystemExit)) and not is_panic(error):
            raise
        raise DataError(f"{location}: {describe_error(error, fallback=_last_line(error))}") from error
    if not is_iterable:
        raise DataError(f"{location}: examples must give an iterable of Example, not {_kind(examples)}")


class _UnusableRecord(DataError):
    """A record that its format refuses."""


def _last_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _kind(value: object) -> str:
    return type(value).__name__


def record_content(record: Record, *, text_key: str) -> bytes:
    """The content that decides whether a record is held out; equal records are on the same side."""
    text = record.fields.get(text_key)
    if isinstance(text, str) and len(record.fields) == 1:
        return text.encode(errors="surrogatepass")
    try:
        return json.dumps(record.fields, sort_keys=True, default=repr).encode()
    except RecursionError:  # a value with hundreds of levels, which JSON can be read with but not written
        plain = {
            key: value if isinstance(value, str | int | float) else None for key, value in record.fields.items()
        }
        return json.dumps(plain, sort_keys=True).encode()


def _rows(chosen: NDArray[np.int64], lengths: NDArray[np.int64], *, spec: DataSpec) -> list[NDArray[np.int64]]:
    if spec.packing == "none":
        return [chosen[i : i + 1] for i in range(len(chosen))]
    return [chosen[row] for row in pack_rows(lengths, seq_len=spec.seq_len, seed=spec.seed)]


def _choose_held_out(keys: NDArray[np.uint64], lengths: NDArray[np.int64], *, share: float) -> NDArray[np.bool_]:
    """Hold out the records with the smallest keys until they reach the share; at least one, never all.

    If the corpus is a single record, its last examples are held out, if it has more than one.
    """
    if share == 0 or len(keys) < 2:
        return np.zeros(len(keys), dtype=bool)
    unique, inverse = np.unique(keys, return_inverse=True)
    if len(unique) == 1:
        return np.arange(len(keys)) >= len(keys) - min(len(keys) - 1, math.ceil(len(keys) * share))
    sizes = np.cumsum(np.bincount(inverse, weights=lengths))
    last = min(int(np.searchsorted(sizes, share * sizes[-1])), len(unique) - 2)
    return np.asarray(inverse <= last)


def _held_out_below(keys: NDArray[np.uint64], *, is_held_out: NDArray[np.bool_]) -> str | None:
    """The smallest key that is not held out, in hex; None if records are on both sides, or nothing is held out."""
    if not is_held_out.any() or is_held_out.all():
        return None
    smallest = int(keys[~is_held_out].min())
    return f"{smallest:x}" if int(keys[is_held_out].max()) < smallest else None


def _unigram(
    spec: DataSpec, *, folder: Path, writer: ExampleWriter, is_held_out: NDArray[np.bool_], vocab_size: int
) -> float | None:
    """The perplexity of a unigram model on the held-out targets; None where targets need not be text."""
    if spec.format not in ("text", "pair"):
        return None
    counts = np.zeros((2, vocab_size), dtype=np.int64)
    for targets, side in _targets_by_side(folder, writer, is_held_out=is_held_out):
        counts[side] += np.bincount(targets, minlength=vocab_size)[:vocab_size]
    return unigram_perplexity(counts[0], held_out_counts=counts[1])


def _targets_by_side(
    folder: Path, examples: ExampleWriter, *, is_held_out: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], int]]:
    targets = np.memmap(folder / "columns" / "targets.bin", dtype="<i4", mode="r")
    at = 0
    for start in range(0, examples.num_examples, _BLOCK):
        lengths = examples.lengths[start : start + _BLOCK]
        block = targets[at : at + int(lengths.sum())].astype(np.int64)
        at += len(block)
        on_side = np.repeat(is_held_out[start : start + _BLOCK], lengths)
        for side in (0, 1):
            yield block[(on_side == side) & (block != IGNORED)], side
