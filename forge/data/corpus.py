"""The text of a corpus: the records of a source as documents, in pieces of at most 2²⁰ characters.

Memory use is independent of the size of the corpus. Empty documents are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from forge.config.classification import LabelsSpec
from forge.config.data import DataSpec
from forge.data.bad_records import BadRecords
from forge.data.format_hint import format_hint
from forge.data.pairs import checked_text, pair_of
from forge.data.sources.base import Record
from forge.data.sources.build import SampleSize, build_source
from forge.data.sources.pieces import blocks_of, pieces_of
from forge.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document, or a piece of a long one; `name` as of its record."""

    name: str
    text: str
    starts: bool = True
    """Whether this is the first piece of its document."""
    ends: bool = True
    """Whether this is the last piece."""


def iter_documents(
    spec: DataSpec, *, bad: BadRecords | None = None, sample: SampleSize | None = None
) -> Iterator[Document]:
    """Stream the corpus; pieces of one document follow each other.

    Args:
        bad: collects records without text, or whose text is not a string or not UTF-8; by default as
            `data.on_bad_record` says.
        sample: how much is read; None: everything.

    Raises: DataError for a pattern without a match, an unreadable or malformed file, a corpus without any text, or
        of `bad`.
    """
    is_empty = True
    bad = bad or BadRecords(action=spec.on_bad_record, is_sample=sample is not None)
    records = build_source(spec, columns=(spec.text_key,), sample=sample).records()
    for document in _documents(records, spec=spec, bad=bad):
        is_empty = False
        yield document
    bad.close()
    if is_empty:
        raise no_text(spec)


def iter_sample(spec: DataSpec, *, max_chars: int, max_files: int = 1024) -> Iterator[str]:
    """At most `max_chars` characters, spread evenly: the beginnings of up to `max_files` parts of the source.

    What a short part does not use goes to those after it, so a corpus within the bounds is read whole. Records that
    cannot be used are left out; the preparation of the corpus names them all.

    Raises: DataError for a file that cannot be read, or if there is no end of bad records.
    """
    bad = BadRecords(action=spec.on_bad_record)
    parts = build_source(spec, columns=(spec.text_key,) if spec.format == "text" else None).parts()
    chosen = [parts[i * len(parts) // max_files] for i in range(max_files)] if len(parts) > max_files else parts
    left = max_chars
    for number, part in enumerate(chosen):
        quota = left // (len(chosen) - number)
        for document in _documents(part, spec=spec, bad=bad):
            text = document.text[:quota]
            quota -= len(text)
            left -= len(text)
            yield text
            if quota <= 0:
                break


def fingerprint(spec: DataSpec) -> str:
    """Digest of what the corpus contains, 32 hex digits. Raises: DataError if a file cannot be found or read."""
    return build_source(spec).fingerprint()


def no_text(spec: DataSpec) -> DataError:
    """The error of a corpus without any text."""
    origin = f"data.files {', '.join(spec.files)}" if spec.files else f"data.dataset {spec.dataset}"
    origin = f"data.source {spec.source}" if spec.source else origin
    return DataError(f"the corpus has no text: every file of {origin} is empty")


def text_of(record: Record, *, text_key: str) -> str:
    """The text field of a record. Raises: DataError if it is no string, or not valid Unicode."""
    if text_key not in record.fields:
        keys, hint = ", ".join(map(repr, record.fields)) or "none", format_hint(record.fields, given="text")
        raise DataError(f"{record.location}: no key {text_key!r} (data.text_key); the keys are: {keys}{hint}")
    return checked_text(record.fields[text_key], key=text_key, location=record.location)


def texts_of(record: Record, *, spec: DataSpec) -> tuple[str, ...]:
    """The texts of a record that its format reads: of a pair both. Raises: DataError."""
    if spec.format == "pair":
        pair = pair_of(record, spec=spec.pair)
        return pair.source, pair.target
    if spec.format == "labelled":
        return (_labelled_text(record, text_key=spec.text_key, labels=spec.labels),)
    return (text_of(record, text_key=spec.text_key),)


def _labelled_text(record: Record, *, text_key: str, labels: LabelsSpec) -> str:
    """The texts of a labelled record. Raises: DataError as `text_of`."""
    words = record.fields.get(labels.words_key)
    if labels.kind == "token" and isinstance(words, list):
        return " ".join(word for word in words if isinstance(word, str))
    text, pair = text_of(record, text_key=text_key), record.fields.get(labels.pair_key)
    return f"{text}\n{pair}" if isinstance(pair, str) else text


def _documents(records: Iterable[Record], *, spec: DataSpec, bad: BadRecords) -> Iterator[Document]:
    for record in bad.usable(records):
        try:
            texts = texts_of(record, spec=spec)
        except DataError as error:
            bad.add(str(error))
            continue
        for text in texts:
            yield from _pieces(record, text=text)


def _pieces(record: Record, *, text: str) -> Iterator[Document]:
    if not (record.starts and record.ends):  # the source has cut it already
        yield Document(name=record.name, text=text, starts=record.starts, ends=record.ends)
        return
    for piece in pieces_of(blocks_of(text)):
        yield Document(name=record.name, text=piece.text, starts=piece.starts, ends=piece.ends)
