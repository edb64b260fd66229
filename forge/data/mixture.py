"""Prepare the corpus of a job: one corpus, or the parts of a mixture and the folder that a run reads them from.

Each part of `data.mixture` is prepared as it would be alone, in a cache of its own. A mixture is one more cache,
whose files are hard links to those of its parts:

    <cache>/data/<names>-<digest>/parts/<name>/…    all files of the cache of a part
                                 /tokenizer/        that of every part

Weights are in no digest, so another weight prepares nothing again. A tokenizer that is trained is trained on all
parts alike, and kept in a cache of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from forge.config.data import DataSpec, TokenizerSpec
from forge.data import corpus
from forge.data.cache import build_once, open_cache
from forge.data.cache_index import INDEX_NAME, PARTS, CacheIndex, PartEntry, SkippedRecords, read_index, write_index
from forge.data.mixture_parts import each_part
from forge.data.noted_records import joined_places
from forge.data.prepare import (
    TOKENIZER_SAMPLE_CHARS,
    PrepareProgress,
    cache_key,
    find_prepared,
    prepare,
    prepare_sample,
    require_no_conversations,
    trained_tokenizer,
    write_tokenizer,
)
from forge.data.sources.build import SampleSize
from forge.data.store import FileEntry, hash_file
from forge.errors import DataError
from forge.fs import link_or_copy, sync_folder
from forge.plan.inputs import CorpusInfo, CorpusPart, LabelsInfo

_VERSION = 1
"""Must change whenever the same parts give another mixture."""
_MAX_NAME = 60
_MAX_SKIPPED_IN_PLAN = 100

_Report = Callable[[PrepareProgress], None]


def prepare_corpus(
    spec: DataSpec, *, cache_dir: Path, on_progress: _Report | None = None, code_digest: str | None = None
) -> CorpusInfo:
    """Return the facts of the prepared corpus of a job; prepare it first if it is not in the cache.

    Raises: DataError and UserCodeError as `prepare`; of a mixture it names the part.
    """
    one = partial(prepare, cache_dir=cache_dir, on_progress=on_progress, code_digest=code_digest)
    if not spec.mixture:
        return one(spec)
    report = on_progress or (lambda _: None)

    def wait() -> None:
        report(PrepareProgress(phase="waiting"))

    if spec.tokenizer.from_pretrained is None:
        require_no_conversations(spec)
        report(PrepareProgress(phase="fingerprint"))
        trained = _tokenizer_cache(spec, cache_dir=cache_dir, code_digest=code_digest)
        build_once(
            trained,
            digest=trained.name,
            write=partial(_train, spec, digest=trained.name, report=report),
            on_wait=wait,
        )
        spec = _with_loaded(spec, trained)
    parts = _each(spec, lambda _, section: one(section))
    assert parts is not None, "prepare gives no None"
    return mix(parts, home=cache_dir.absolute() / "data", on_wait=wait)


def find_corpus(spec: DataSpec, *, cache_dir: Path, code_digest: str | None = None) -> CorpusInfo | None:
    """Return the facts of a corpus that was prepared before and did not change; None if there is none.

    Raises: DataError if the corpus or the tokenizer cannot be read.
    """
    one = partial(find_prepared, cache_dir=cache_dir, code_digest=code_digest)
    if not spec.mixture:
        return one(spec)
    home = cache_dir.absolute() / "data"
    if not any(home.glob(f"{_name([part.name for part in spec.mixture])}-*")):
        return None  # without reading the corpus
    if spec.tokenizer.from_pretrained is None:
        trained = _tokenizer_cache(spec, cache_dir=cache_dir, code_digest=code_digest)
        try:
            open_cache(trained, digest=trained.name)
        except DataError:
            return None
        spec = _with_loaded(spec, trained)
    parts = _each(spec, lambda _, section: one(section))
    return None if parts is None else mix(parts, home=home)


def sample_corpus(
    spec: DataSpec, *, size: SampleSize, folder: Path, code_digest: str | None = None
) -> CorpusInfo | None:
    """Prepare a sample of a corpus in an empty folder, as `prepare_sample`; of a mixture, of each part.

    Returns: the facts; None if the sample of a part does not fill a sequence.
    """
    if not spec.mixture:
        return prepare_sample(spec, size=size, folder=folder, code_digest=code_digest)
    if spec.tokenizer.from_pretrained is None:
        require_no_conversations(spec)
        write_tokenizer(folder, trained_tokenizer(spec, _texts(spec, max_chars=size.num_chars)))
        spec = _with_loaded(spec, folder)
    size = replace(size, num_records=max(1, size.num_records // len(spec.mixture)))

    def sample(name: str, section: DataSpec) -> CorpusInfo | None:
        own = folder / f"part-{name}"
        own.mkdir()
        return prepare_sample(section, size=size, folder=own, code_digest=code_digest)

    parts = _each(spec, sample)
    return None if parts is None else mix(parts, home=folder / PARTS)


def mix(parts: Sequence[CorpusPart], *, home: Path, on_wait: Callable[[], None] = lambda: None) -> CorpusInfo:
    """Return the facts of a mixture of prepared parts; make its folder in `home` first if it does not exist.

    Raises: DataError if the parts have not the same arrays, or the folder cannot be written.
    """
    _require_same_arrays(parts)
    digest = _digest([_VERSION, [(part.name, part.corpus.digest) for part in parts]])
    folder = home / f"{_name([part.name for part in parts])}-{digest[:16]}"
    facts = _facts(parts, folder=folder, digest=digest)
    try:
        open_cache(folder, digest=digest)
    except DataError:
        build_once(folder, digest=digest, write=partial(_link, facts), on_wait=on_wait)
    return facts


def _each(spec: DataSpec, make: Callable[[str, DataSpec], CorpusInfo | None]) -> list[CorpusPart] | None:
    """Return the parts that `make` returns; None as soon as it returns None."""
    parts: list[CorpusPart] = []
    for part, found in zip(spec.mixture, each_part(spec, make), strict=False):
        if found is None:
            return None
        parts.append(CorpusPart(name=part.name, corpus=found))
    return parts


def _tokenizer_cache(spec: DataSpec, *, cache_dir: Path, code_digest: str | None) -> Path:
    """The folder of the tokenizer that is trained on all parts; its name is its digest."""
    keys = list(each_part(spec, lambda _, part: cache_key(part, tokenizer=None, code_digest=code_digest)))
    return cache_dir.absolute() / "data" / f"tokenizer-{_digest([_VERSION, keys])}"


def _train(spec: DataSpec, folder: Path, *, digest: str, report: _Report) -> CacheIndex:
    """Train the tokenizer of all parts, and write it as a cache without tokens."""
    report(PrepareProgress(phase="tokenizer"))
    tokenizer = trained_tokenizer(spec, _texts(spec, max_chars=TOKENIZER_SAMPLE_CHARS))
    index = CacheIndex(
        digest=digest,
        dtype=tokenizer.dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        num_documents=0,
        num_text_bytes=0,
        unigram_perplexity=None,
        train=(),
        held_out=(),
        tokenizer=write_tokenizer(folder, tokenizer),
    )
    sync_folder(folder / "tokenizer")
    write_index(folder, index=index)
    return index


def _texts(spec: DataSpec, *, max_chars: int) -> Iterator[str]:
    """Text of all parts, as much of each; what a short part does not use goes to those after it."""
    left = max_chars
    samples = each_part(spec, lambda _, part: partial(corpus.iter_sample, part))
    for number, sample in enumerate(samples):
        for text in sample(max_chars=left // (len(spec.mixture) - number)):
            left -= len(text)
            yield text


def _with_loaded(spec: DataSpec, folder: Path) -> DataSpec:
    """Return the section with the tokenizer in a folder of the cache."""
    return spec.model_copy(update={"tokenizer": TokenizerSpec(from_pretrained=str(folder / "tokenizer"))})


def _name(names: Sequence[str]) -> str:
    return "-".join(names)[:_MAX_NAME].strip("-_")


def _require_same_arrays(parts: Sequence[CorpusPart]) -> None:
    """Raises: DataError if the examples of a part have other arrays than those of the first."""
    arrays = [_arrays(part) for part in parts]
    for number, (part, own) in enumerate(zip(parts, arrays, strict=True)):
        if own != arrays[0]:
            raise DataError(
                f"data.mixture[{number}]: part {part.name}: its examples have the arrays {', '.join(own)}, those "
                f"of part {parts[0].name} {', '.join(arrays[0])}; the records of all parts must have the same form"
            )


def _arrays(part: CorpusPart) -> list[str]:
    layout = read_index(Path(part.corpus.folder)).examples
    columns = layout.columns if layout is not None else ()
    return sorted(f"{one.name} {one.dtype}{list(one.shape) if one.shape else ''}" for one in columns)


def _link(facts: CorpusInfo, folder: Path) -> CacheIndex:
    """Write the folder of a mixture: links to the files of its parts, the index last."""
    tables: list[FileEntry] = []
    for part in facts.parts:
        own = Path(part.corpus.folder)
        index, written = read_index(own), own / INDEX_NAME
        entries = [*index.files, FileEntry(
            name=INDEX_NAME, size_bytes=written.stat().st_size, blake2b=hash_file(written)
        )]  # fmt: skip
        for entry in entries:
            target = folder / PARTS / part.name / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(own / entry.name, target)
            tables.append(replace(entry, name=f"{PARTS}/{part.name}/{entry.name}"))
    first = Path(facts.parts[0].corpus.folder)
    tokenizer = read_index(first).tokenizer
    (folder / "tokenizer").mkdir()
    for entry in tokenizer:
        link_or_copy(first / entry.name, folder / entry.name)
    for name in {path.parent for path in folder.rglob("*")} - {folder}:
        sync_folder(name)
    perplexity = facts.unigram_perplexity
    index = CacheIndex(
        digest=facts.digest,
        dtype=read_index(first).dtype,
        vocab_size=facts.vocab_size,
        eot_id=facts.eot_id,
        num_documents=facts.num_documents,
        num_text_bytes=facts.num_text_bytes,
        unigram_perplexity=None if math.isnan(perplexity) else perplexity,
        train=(),
        held_out=(),
        tokenizer=tokenizer,
        tables=tuple(tables),
        skipped=SkippedRecords(count=facts.num_skipped_records, listed=facts.skipped_records),
        pad_id=facts.pad_id,
        parts=tuple(PartEntry(name=part.name, digest=part.corpus.digest) for part in facts.parts),
    )
    write_index(folder, index=index)
    return index


def _facts(parts: Sequence[CorpusPart], *, folder: Path, digest: str) -> CorpusInfo:
    """Sums over the parts; the unigram perplexity is that of each part's own model, over all held-out tokens."""
    every = [part.corpus for part in parts]
    names = ("documents", "text_bytes", "train_tokens", "held_out_tokens", "train_sequences", "held_out_sequences")
    sums = {f"num_{name}": sum(getattr(one, f"num_{name}") for one in every) for name in names}
    notes: Counter[str] = Counter()
    for one in every:
        notes.update(one.notes)
    skipped = [f"{part.name}: {record}" for part in parts for record in part.corpus.skipped_records]
    foreign = [f"part {part.name}: {part.corpus.foreign_target}" for part in parts if part.corpus.foreign_target]
    return replace(
        every[0],
        folder=str(folder),
        digest=digest,
        **sums,
        unigram_perplexity=_unigram(every),
        num_skipped_records=sum(one.num_skipped_records for one in every),
        skipped_records=tuple(skipped[:_MAX_SKIPPED_IN_PLAN]),
        labels=_labels(every),
        num_examples=sum(one.num_examples for one in every),
        padding=sum(one.padding * one.num_train_sequences for one in every) / sums["num_train_sequences"],
        notes=dict(notes),
        noted_records=joined_places(one.noted_records for one in every),
        foreign_target=foreign[0] if foreign else None,
        parts=tuple(parts),
    )


def _unigram(every: Sequence[CorpusInfo]) -> float:
    """nan if a part with held-out tokens has none."""
    held_out = [one for one in every if one.num_held_out_tokens]
    total = sum(one.num_held_out_tokens for one in held_out)
    if not total:
        return math.nan
    return math.exp(sum(math.log(one.unigram_perplexity) * one.num_held_out_tokens for one in held_out) / total)


def _labels(every: Sequence[CorpusInfo]) -> LabelsInfo | None:
    """The labels of all parts, which have the same names."""
    found = [one.labels for one in every if one.labels is not None]
    if not found:
        return None
    return LabelsInfo(
        names=found[0].names,
        train_counts=tuple(map(sum, zip(*(one.train_counts for one in found), strict=True))),
        held_out_counts=tuple(map(sum, zip(*(one.held_out_counts for one in found), strict=True))),
        num_train=sum(one.num_train for one in found),
    )


def _digest(settings: object) -> str:
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
