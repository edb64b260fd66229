"""Prepare the corpus of a `data:` section: tokenize it into a cache that later runs reuse.

Returns CorpusInfo for the plan, and rows for the ranks. The cache folder is `<cache_dir>/data/<name>-<digest>`. The
digest covers the text and every setting that changes a token, so a cache is never out of date. With `packing:
concatenate`, `seq_len` is not part of the digest. `forge.data.cache` builds the folder, all or nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from forge.config.data import DataSpec
from forge.data import corpus, store
from forge.data.added_tokens import open_tokenizer
from forge.data.cache import build_once, open_cache
from forge.data.cache_index import (
    FORMAT_VERSION,
    PARTS,
    CacheIndex,
    ExampleLayout,
    read_index,
    write_index,
)
from forge.data.example_store import ExampleRows
from forge.data.format_process import write_examples_in_process
from forge.data.formats.registry import TEMPLATE_FORMATS
from forge.data.prepare_examples import chat_settings, write_examples
from forge.data.prepare_streams import write_streams
from forge.data.rows import MixedRows, RowStore, StreamRows, WindowColumns
from forge.data.sources.build import SampleSize
from forge.data.store import FileEntry, TokenStream
from forge.data.tokenizer import TextTokenizer, train_tokenizer
from forge.data.tokenizer_files import role_id, role_token, special_ids
from forge.errors import DataError
from forge.fs import sync_folder
from forge.plan.inputs import CorpusInfo, LabelsInfo
from forge.user_code import is_reference

TOKENIZER_SAMPLE_CHARS = 1 << 26
"""Most text that a tokenizer is trained on; more hardly changes the first 10⁵ merges."""

READER_VERSION = 2
"""Must change whenever the same files give other records."""

EXAMPLES_VERSION = 2
"""Must change whenever the same records give other examples or rows."""

_MAX_SKIPPED_IN_PLAN = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareProgress:
    """Progress of the preparation; the counts belong to the phases `tokens` and, of examples, `outputs`."""

    phase: Literal["look", "fingerprint", "waiting", "tokenizer", "tokens", "outputs"]
    num_documents: int = 0
    num_documents_in_all: int = 0
    """0 where that is not known."""
    num_text_bytes: int = 0
    num_tokens: int = 0


_Report = Callable[[PrepareProgress], None]


def prepare(
    spec: DataSpec, *, cache_dir: Path, on_progress: _Report | None = None, code_digest: str | None = None
) -> CorpusInfo:
    """Return the facts of the prepared corpus; build its cache first if it does not exist.

    The documents with the smallest keyed hash of their text are held out, so the choice does not depend on order or
    file names, and exact copies of a document are on the same side. The share is measured in text. At least one
    document is held out and one kept; if the corpus is a single document, its end is held out.

    Args:
        code_digest: of the unpacked code, if `data.format` is a class in it; a subprocess imports it.

    Raises: DataError if the corpus or the tokenizer cannot be used, the cache cannot be written, or the
        training tokens do not fill one sequence; UserCodeError.
    """
    report = on_progress or (lambda _: None)
    report(PrepareProgress(phase="fingerprint"))
    loaded = open_tokenizer(spec.tokenizer)
    digest = cache_key(spec, tokenizer=loaded, code_digest=code_digest)
    folder = _cache_folder(spec, cache_dir=cache_dir, digest=digest)
    try:
        index = open_cache(folder, digest=digest)
    except DataError:
        index = build_once(
            folder,
            digest=digest,
            write=lambda draft: _write_cache(
                spec, folder=draft, digest=digest, tokenizer=loaded, report=report, code_digest=code_digest
            ),
            on_wait=lambda: report(PrepareProgress(phase="waiting")),
        )
    return _facts(index, folder=folder, seq_len=spec.seq_len)


def find_prepared(spec: DataSpec, *, cache_dir: Path, code_digest: str | None = None) -> CorpusInfo | None:
    """Return the facts of a corpus that was prepared before and did not change; None if there is none.

    Raises: DataError if the corpus or the tokenizer cannot be read.
    """
    folder = cache_dir.absolute() / "data"
    if not any(folder.glob(f"{corpus_name(spec)}-*")):
        return None  # without reading the corpus
    loaded = open_tokenizer(spec.tokenizer)
    digest = cache_key(spec, tokenizer=loaded, code_digest=code_digest)
    folder = _cache_folder(spec, cache_dir=cache_dir, digest=digest)
    try:
        return _facts(open_cache(folder, digest=digest), folder=folder, seq_len=spec.seq_len)
    except DataError:
        return None


def open_rows(facts: CorpusInfo) -> tuple[RowStore, RowStore]:
    """Open the training rows and the held-out rows; file sizes are verified.

    Raises: DataError if the cache is missing, or is not the one that was planned with.
    """
    folder = Path(facts.folder)
    index = read_index(folder)
    if index.digest != facts.digest:
        raise DataError(f"{folder} holds the corpus {index.digest}, the plan says {facts.digest}; plan again")
    if facts.parts or index.parts:
        if [part.name for part in facts.parts] != [part.name for part in index.parts]:
            raise DataError(f"{folder} holds other parts of a mixture than the plan; plan again")
        sides = [open_rows(part) for part in parts_of(facts)]
        return MixedRows(parts=tuple(train for train, _ in sides)), MixedRows(
            parts=tuple(held for _, held in sides)
        )
    if index.examples is not None:
        return (
            ExampleRows(folder=folder, index=index, split="train"),
            ExampleRows(folder=folder, index=index, split="held_out"),
        )
    train, held_out = (
        StreamRows(stream=TokenStream(folder=folder, entries=entries, dtype=index.dtype), seq_len=facts.seq_len)
        for entries in (index.train, index.held_out)
    )
    further = index.stream_columns
    if further is None:
        return train, held_out
    if further.seq_len != facts.seq_len:
        raise DataError(f"{folder} was made for data.seq_len {further.seq_len}, not {facts.seq_len}; plan again")
    columns = partial(WindowColumns, folder=folder, layout=further, num_windows=train.num_rows + held_out.num_rows)
    return replace(train, further=columns(first=0)), replace(held_out, further=columns(first=train.num_rows))


def parts_of(facts: CorpusInfo) -> tuple[CorpusInfo, ...]:
    """Return the parts of a mixture where a run reads them; of another corpus, itself."""
    folder = Path(facts.folder) / PARTS
    return tuple(replace(part.corpus, folder=str(folder / part.name)) for part in facts.parts) or (facts,)


def prepare_sample(
    spec: DataSpec, *, size: SampleSize, folder: Path, code_digest: str | None = None
) -> CorpusInfo | None:
    """Prepare a sample of a corpus in an empty folder; the corpus is neither hashed nor read whole.

    A tokenizer that is to be trained is trained on as much text.

    Returns: the facts; None if the sample does not fill a sequence.
    Raises: DataError as `prepare`; UserCodeError.
    """
    index = _write_cache(
        spec,
        folder=folder,
        digest="sample",
        tokenizer=open_tokenizer(spec.tokenizer),
        report=lambda _: None,
        code_digest=code_digest,
        sample=size,
    )
    if index.examples is None and index.num_train_tokens <= spec.seq_len:
        return None
    return _facts(index, folder=folder, seq_len=spec.seq_len)


def cache_key(spec: DataSpec, *, tokenizer: TextTokenizer | None, code_digest: str | None) -> str:
    described = asdict(tokenizer) if tokenizer else {"train": "bpe", "vocab_size": spec.tokenizer.vocab_size}
    if spec.tokenizer.special_tokens:
        described |= {"added": list(spec.tokenizer.special_tokens)}
    settings: dict[str, object] = {
        "format": FORMAT_VERSION,
        "corpus": corpus.fingerprint(spec),
        "text_key": spec.text_key,
        "tokenizer": described | {"special_tokens": spec.special_tokens},
        "held_out": spec.held_out,
        "seed": spec.seed,
    }
    if spec.on_bad_record != "fail":  # what is prepared otherwise has no bad record
        settings |= {"on_bad_record": spec.on_bad_record}
    if spec.source is None:
        settings |= {"reader": READER_VERSION, "file_type": spec.file_type}
    if spec.packing != "concatenate":
        settings |= {
            "examples": EXAMPLES_VERSION,
            "format": spec.format,
            "packing": spec.packing,
            "seq_len": spec.seq_len,
        }
        settings |= {"code": code_digest} if is_reference(spec.format) else {}
        settings |= {"chat": asdict(chat_settings(spec))} if spec.format in TEMPLATE_FORMATS else {}
        settings |= {"preference": spec.preference.model_dump()} if spec.format == "preference" else {}
        settings |= {"labels": spec.labels.model_dump(mode="json")} if spec.format == "labelled" else {}
        settings |= {"pair": spec.pair.model_dump()} if spec.format == "pair" else {}
        settings |= {"embedding": spec.embedding.model_dump()} if spec.format == "embedding" else {}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _cache_folder(spec: DataSpec, *, cache_dir: Path, digest: str) -> Path:
    return cache_dir.absolute() / "data" / f"{corpus_name(spec)}-{digest[:16]}"


def corpus_name(spec: DataSpec) -> str:
    """A readable folder name: the source, or the last part of the data set or first pattern without wildcards."""
    if spec.source is not None:
        return spec.source
    given = spec.files[0] if spec.files else str(spec.dataset)
    fixed = re.split(r"[*?\[]", given, maxsplit=1)[0].rstrip("/")
    word = fixed.rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-")[:40] or "corpus"


def _facts(index: CacheIndex, *, folder: Path, seq_len: int) -> CorpusInfo:
    sizes = _stream_sizes(index, seq_len=seq_len) if index.examples is None else _example_sizes(index.examples)
    perplexity = index.unigram_perplexity
    return CorpusInfo(
        folder=str(folder),
        digest=index.digest,
        vocab_size=index.vocab_size,
        eot_id=index.eot_id,
        seq_len=seq_len,
        num_documents=index.num_documents,
        num_text_bytes=index.num_text_bytes,
        unigram_perplexity=math.nan if perplexity is None else perplexity,
        num_skipped_records=index.skipped.count,
        skipped_records=index.skipped.listed[:_MAX_SKIPPED_IN_PLAN],
        labels=_labels(index),
        pad_id=_pad_id(folder / "tokenizer") if index.pad_id is None else index.pad_id,
        **sizes,
    )


def _labels(index: CacheIndex) -> LabelsInfo | None:
    found = index.labels
    if found is None or index.examples is None:
        return None
    return LabelsInfo(
        names=found.names,
        train_counts=found.train,
        held_out_counts=found.held_out,
        num_train=index.examples.train.num_targets,
    )


def require_no_conversations(spec: DataSpec) -> None:
    """Raises: DataError if a tokenizer would have to be trained on conversations, which have no text field."""
    if spec.format == "chat":
        raise DataError(
            "data.format: chat needs a tokenizer, and none is trained on conversations; set "
            "data.tokenizer.from_pretrained to the folder of a chat model"
        )


def _pad_id(tokenizer: Path) -> int | None:
    """The id of the padding token that a tokenizer's files name, if they name one."""
    token = role_token(tokenizer, "pad_token")
    return None if token is None else special_ids(tokenizer).get(token)


def _stream_sizes(index: CacheIndex, *, seq_len: int) -> dict[str, Any]:
    num_train, num_held_out = index.num_train_tokens, index.num_held_out_tokens
    if num_train < seq_len + 1:
        raise DataError(
            f"the corpus has {num_train} training tokens ({index.num_documents} documents, {num_held_out} tokens"
            f" held out), but one sequence takes data.seq_len + 1 = {seq_len + 1}. Add text, or set data.seq_len"
            f" to {num_train - 1} or less"
        )
    return {
        "num_train_tokens": num_train,
        "num_held_out_tokens": num_held_out,
        "num_train_sequences": (num_train - 1) // seq_len,
        "num_held_out_sequences": max(0, num_held_out - 1) // seq_len,
    }


def _example_sizes(layout: ExampleLayout) -> dict[str, Any]:
    train, held_out = layout.train, layout.held_out
    return {
        "num_train_tokens": train.num_targets,
        "num_held_out_tokens": held_out.num_targets,
        "num_train_sequences": train.num_rows,
        "num_held_out_sequences": held_out.num_rows,
        "packing": layout.packing,
        "num_examples": train.num_examples + held_out.num_examples,
        "padding": 1 - train.num_tokens / (train.num_rows * layout.seq_len),
        "notes": layout.notes,
        "noted_records": layout.noted_records,
        "foreign_target": layout.foreign_target,
    }


def _write_cache(
    spec: DataSpec,
    *,
    folder: Path,
    digest: str,
    tokenizer: TextTokenizer | None,
    report: _Report,
    code_digest: str | None,
    sample: SampleSize | None = None,
) -> CacheIndex:
    """Write all files of the cache, the index last."""
    if tokenizer is None:
        require_no_conversations(spec)
        report(PrepareProgress(phase="tokenizer"))
        max_chars = TOKENIZER_SAMPLE_CHARS if sample is None else sample.num_chars
        tokenizer = trained_tokenizer(spec, corpus.iter_sample(spec, max_chars=max_chars))
    tokenizer = replace(tokenizer, special_tokens=spec.special_tokens)
    if spec.packing == "concatenate":
        write: Callable[..., CacheIndex] = write_streams
    else:
        is_apart = is_reference(spec.format) or spec.format in TEMPLATE_FORMATS
        write = partial(write_examples_in_process, code_digest=code_digest) if is_apart else write_examples
    progress = _progress_of(report)
    index = write(spec, folder=folder, digest=digest, tokenizer=tokenizer, report=progress, sample=sample)
    index = replace(index, tokenizer=write_tokenizer(folder, tokenizer))
    for name in {path.parent for path in folder.rglob("*")} - {folder}:
        sync_folder(name)
    pad_id = role_id("pad_token", content=tokenizer.content, config=tokenizer.config, files=tokenizer.files)
    index = replace(index, pad_id=pad_id)
    write_index(folder, index=index)
    return index


def trained_tokenizer(spec: DataSpec, texts: Iterable[str]) -> TextTokenizer:
    """Train the tokenizer of a job."""
    return train_tokenizer(
        texts,
        vocab_size=spec.tokenizer.vocab_size,
        special_tokens=spec.tokenizer.special_tokens,
        adds_end=spec.format == "pair",
    )


def write_tokenizer(folder: Path, tokenizer: TextTokenizer) -> tuple[FileEntry, ...]:
    """Write the files of a tokenizer into the folder `tokenizer` of a cache."""
    files = {"tokenizer/tokenizer.json": tokenizer.content, "tokenizer/tokenizer_config.json": tokenizer.config}
    files |= {f"tokenizer/{name}": text for name, text in tokenizer.files.items()}
    return tuple(store.write_file(folder, name=name, content=text.encode()) for name, text in files.items())


def _progress_of(report: _Report) -> Callable[[int, int, int], None]:
    return lambda documents, size, tokens: report(
        PrepareProgress(phase="tokens", num_documents=documents, num_text_bytes=size, num_tokens=tokens)
    )
