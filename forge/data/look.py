"""Look at a corpus before it is read: its files, their kinds and sizes, and whether a sample of them can be parsed.

`forge plan` shows the result, and a run records it. Nothing is tokenized, and no more than a sample is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from forge.config.data import DataSpec
from forge.data.bad_records import BadRecords
from forge.data.corpus import texts_of
from forge.data.mixture_parts import each_part
from forge.data.sources.base import Record
from forge.data.sources.build import file_source
from forge.data.sources.detect import open_content
from forge.data.sources.files import FileSource, read_records, reading
from forge.data.sources.listing import Matched, Skipped, SourceFile
from forge.data.sources.stdlib import StdlibSource
from forge.errors import DataError, printable
from forge.plan.inputs import CorpusFiles, PatternFiles, SkippedFiles

MAX_OPENED = 10_000
"""Local files of a pattern that are opened to see their kind; the others are opened when they are read."""
MAX_OPENED_REMOTE = 32
"""The same for a store, where opening a file takes a request."""
_MAX_SAMPLED = 16
"""Files that the sample is spread over; of a store a quarter."""
_SAMPLE_RECORDS = 50
_SAMPLE_CHARS = 1 << 18
"""Most of one file."""
_MAX_EXAMPLES = 5
_COUNTED_BYTES = 2**26
"""In a corpus of at most this size bad records are found when it is prepared, all of them."""
_UNOPENED = "not opened yet"


def look_at_corpus(spec: DataSpec, *, special_tokens: Sequence[str] = ()) -> CorpusFiles:
    """List the files of a corpus, find out their kinds and parse a sample of their records.

    Args:
        special_tokens: names of the tokenizer's special tokens, to be counted in the sample.

    Raises: DataError as reading the corpus would, for what can be seen in the sample; for a file in two parts of a
        mixture.
    """
    if not spec.mixture:
        return _look(spec, special_tokens=special_tokens)
    patterns: list[PatternFiles] = []
    special, num_sampled = Counter[str](), 0
    part_of: dict[tuple[int, str], str] = {}

    def look(name: str, section: DataSpec) -> CorpusFiles:
        def require_own(file: SourceFile) -> None:
            key = id(file.fs), os.path.realpath(file.path) if file.is_local else file.path
            if (other := part_of.setdefault(key, name)) != name:
                raise DataError(f"{file.shown} is in part {other} too; one would train on what the other holds out")

        found = _look(section, special_tokens=special_tokens, on_file=require_own)
        return replace(
            found, patterns=tuple(replace(one, pattern=f"{name}: {one.pattern}") for one in found.patterns)
        )

    for found in each_part(spec, look):
        patterns += found.patterns
        special.update(found.special_tokens)
        num_sampled += found.num_sampled
    return CorpusFiles(
        patterns=tuple(patterns), num_sampled=num_sampled, special_tokens=dict(special), folder=str(Path.cwd())
    )


def _look(
    spec: DataSpec, *, special_tokens: Sequence[str], on_file: Callable[[SourceFile], None] = lambda _: None
) -> CorpusFiles:
    if spec.source is not None:
        files = StdlibSource(text_key=spec.text_key).files()
        for file in files:
            on_file(file)
        listed = [Matched(pattern=str(spec.source), files=tuple(files), skipped=())]
        kinds = [{"Python source": len(files)}]
        patterns = tuple(map(_pattern_files, listed, kinds))
        return CorpusFiles(patterns=patterns, num_sampled=0, folder=str(Path.cwd()))
    columns = (spec.text_key,) if spec.format == "text" else None
    source = file_source(spec, columns=columns)
    listed = list(source.matched())
    for file in (file for matched in listed for file in matched.files):
        on_file(file)
    kinds_of_files = [_kinds(matched.files, source=source) for matched in listed]
    sample = _sampled(listed, kinds_of_files)
    num_sampled = 0
    spelled = dict.fromkeys(special_tokens, 0)
    bad = BadRecords(action=spec.on_bad_record, is_sample=True)
    for file in sample:
        for record in bad.usable(_first_records(file, source=source)):
            num_sampled += 1
            text = _text(record, spec=spec, bad=bad)
            for name in spelled:
                spelled[name] += text.count(name)
    found = CorpusFiles(
        patterns=tuple(
            _pattern_files(matched, _counted(kinds)) for matched, kinds in zip(listed, kinds_of_files, strict=True)
        ),
        num_sampled=num_sampled,
        special_tokens={name: count for name, count in spelled.items() if count},
        folder=str(Path.cwd()),
    )
    if found.size_bytes > _COUNTED_BYTES:
        bad.close()
    return found


def _text(record: Record, *, spec: DataSpec, bad: BadRecords) -> str:
    """The text of a record, empty for formats that have none or if it cannot be used."""
    if spec.format not in ("text", "pair"):
        return ""
    try:
        return "\n".join(texts_of(record, spec=spec))
    except DataError as error:
        bad.add(str(error))
        return ""


def _kinds(files: Sequence[SourceFile], *, source: FileSource) -> list[str]:
    """The kind of every file. Raises: DataError for one that cannot be read as documents."""
    most = MAX_OPENED if all(file.is_local for file in files) else MAX_OPENED_REMOTE
    chosen = set(_evenly(len(files), most))
    return [_kind(file, source=source) if i in chosen else _UNOPENED for i, file in enumerate(files)]


def _kind(file: SourceFile, *, source: FileSource) -> str:
    with (
        reading(file),
        open_content(file, file_type=source.file_type, text_key=source.text_key) as (content, _),
    ):
        return content.kind


def _sampled(listed: Sequence[Matched], kinds: Sequence[Sequence[str]]) -> list[SourceFile]:
    """The first file of every kind of every pattern, and others, spread evenly."""
    pairs = [
        pair
        for matched, named in zip(listed, kinds, strict=True)
        for pair in zip(matched.files, named, strict=True)
    ]
    most = _MAX_SAMPLED if all(file.is_local for file, _ in pairs) else _MAX_SAMPLED // 4
    firsts = {kind: file for file, kind in reversed(pairs)}
    spread = [pairs[i][0] for i in _evenly(len(pairs), most)]
    return list({file.path: file for file in [*firsts.values(), *spread]}.values())[:most]


def _first_records(file: SourceFile, *, source: FileSource) -> Iterator[Record]:
    num_chars = 0
    for number, record in enumerate(read_records(file, source=source)):
        yield record
        num_chars += sum(len(value) for value in record.fields.values() if isinstance(value, str))
        if number + 1 >= _SAMPLE_RECORDS or num_chars >= _SAMPLE_CHARS:
            return


def _evenly(total: int, most: int) -> list[int]:
    return list(range(total)) if total <= most else [i * total // most for i in range(most)]


def _counted(kinds: Sequence[str]) -> dict[str, int]:
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _pattern_files(matched: Matched, kinds: dict[str, int]) -> PatternFiles:
    by_reason = groupby(sorted(matched.skipped, key=lambda one: one.reason), key=lambda one: one.reason)
    return PatternFiles(
        pattern=printable(matched.pattern, limit=1000),
        num_files=len(matched.files),
        size_bytes=sum(file.size_bytes for file in matched.files),
        kinds=kinds,
        examples=tuple(file.shown for file in matched.files[:_MAX_EXAMPLES]),
        skipped=tuple(_skipped(reason, list(group)) for reason, group in by_reason),
    )


def _skipped(reason: str, group: Sequence[Skipped]) -> SkippedFiles:
    examples = tuple(printable(one.path, limit=1000) for one in group[:_MAX_EXAMPLES])
    return SkippedFiles(reason=reason, count=len(group), examples=examples)
