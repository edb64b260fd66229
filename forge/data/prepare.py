"""Prepare the corpus of a `data:` section: tokenize it into a cache that later runs reuse.

Returns CorpusInfo for the plan, and rows for the ranks. The cache folder is `<cache_dir>/data/<name>-<digest>`. The
digest covers the text and every setting that changes a token, so a cache is never out of date. With `packing:
concatenate`, `seq_len` is not part of the digest. `forge.data.cache` builds the folder, all or nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from forge.config.data import DataSpec
from forge.data import corpus, store
from forge.data.bad_records import BadRecords
from forge.data.cache import build_once, open_cache
from forge.data.cache_index import (
    FORMAT_VERSION,
    CacheIndex,
    ExampleLayout,
    SkippedRecords,
    read_index,
    write_index,
)
from forge.data.corpus import Document
from forge.data.example_store import ExampleRows
from forge.data.format_process import write_examples_in_process
from forge.data.prepare_examples import chat_settings, write_examples
from forge.data.rows import RowStore, StreamRows
from forge.data.store import Packer, Split, TokenStream
from forge.data.tokenizer import TextTokenizer, encode_batches, load_tokenizer, train_tokenizer
from forge.data.unigram import unigram_perplexity
from forge.errors import DataError
from forge.fs import sync_folder
from forge.limits import usable_cpus
from forge.plan.inputs import CorpusInfo
from forge.user_code import is_reference

TOKENIZER_SAMPLE_CHARS = 1 << 26
"""Most text that a tokenizer is trained on; more hardly changes the first 10⁵ merges."""

SMALL_CORPUS_CHARS = 1 << 26
"""Up to this size a corpus is read twice (half a second), to hold out exactly the requested share."""

MAX_PROCESSES = 16
"""With more, the single process that reads and writes is the bottleneck."""

READER_VERSION = 2
"""Must change whenever the same files give other records."""

EXAMPLES_VERSION = 2
"""Must change whenever the same records give other examples or rows."""

_BATCH_CHARS = 1 << 20
"""Text per encoding batch; 0.1 s of one process."""


_MAX_SKIPPED_IN_PLAN = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareProgress:
    """Progress of the preparation; the counts belong to the phase `tokens`."""

    phase: Literal["look", "fingerprint", "waiting", "tokenizer", "tokens"]
    num_documents: int = 0
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
    loaded = load_tokenizer(spec.tokenizer.from_pretrained) if spec.tokenizer.from_pretrained else None
    digest = _cache_key(spec, tokenizer=loaded, code_digest=code_digest)
    folder = cache_dir.absolute() / "data" / f"{_corpus_name(spec)}-{digest[:16]}"
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


def open_rows(facts: CorpusInfo) -> tuple[RowStore, RowStore]:
    """Open the training rows and the held-out rows; file sizes are verified.

    Raises: DataError if the cache is missing, or is not the one that was planned with.
    """
    folder = Path(facts.folder)
    index = read_index(folder)
    if index.digest != facts.digest:
        raise DataError(f"{folder} holds the corpus {index.digest}, the plan says {facts.digest}; plan again")
    if index.examples is not None:
        return (
            ExampleRows(folder=folder, index=index, split="train"),
            ExampleRows(folder=folder, index=index, split="held_out"),
        )
    train, held_out = (
        StreamRows(stream=TokenStream(folder=folder, entries=entries, dtype=index.dtype), seq_len=facts.seq_len)
        for entries in (index.train, index.held_out)
    )
    return train, held_out


def _cache_key(spec: DataSpec, *, tokenizer: TextTokenizer | None, code_digest: str | None) -> str:
    described = asdict(tokenizer) if tokenizer else {"train": "bpe", "vocab_size": spec.tokenizer.vocab_size}
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
    if spec.files is not None:
        settings |= {"reader": READER_VERSION, "file_type": spec.file_type}
    if spec.packing != "concatenate":
        settings |= {
            "examples": EXAMPLES_VERSION,
            "format": spec.format,
            "packing": spec.packing,
            "seq_len": spec.seq_len,
        }
        settings |= {"code": code_digest} if is_reference(spec.format) else {}
        settings |= {"chat": asdict(chat_settings(spec))} if spec.format == "chat" else {}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _corpus_name(spec: DataSpec) -> str:
    """A readable folder name: the source, or the last part of the first pattern without wildcards."""
    if spec.files is None:
        return str(spec.source)
    fixed = re.split(r"[*?\[]", spec.files[0], maxsplit=1)[0].rstrip("/")
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
        **sizes,
    )


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
) -> CacheIndex:
    """Write all files of the cache, the index last."""
    if tokenizer is None:
        report(PrepareProgress(phase="tokenizer"))
        sample = corpus.iter_sample(spec, max_chars=TOKENIZER_SAMPLE_CHARS)
        tokenizer = train_tokenizer(sample, vocab_size=spec.tokenizer.vocab_size)
    tokenizer = replace(tokenizer, special_tokens=spec.special_tokens)
    if spec.packing == "concatenate":
        index = _write_streams(spec, folder=folder, digest=digest, tokenizer=tokenizer, report=report)
    else:
        is_apart = is_reference(spec.format) or spec.format == "chat"
        write = partial(write_examples_in_process, code_digest=code_digest) if is_apart else write_examples
        index = write(spec, folder=folder, digest=digest, tokenizer=tokenizer, report=_progress_of(report))
    files = {"tokenizer/tokenizer.json": tokenizer.content, "tokenizer/tokenizer_config.json": tokenizer.config}
    files |= {f"tokenizer/{name}": text for name, text in tokenizer.files.items()}
    written = [store.write_file(folder, name=name, content=text.encode()) for name, text in files.items()]
    for name in {path.parent for path in folder.rglob("*")} - {folder}:
        sync_folder(name)
    index = replace(index, tokenizer=tuple(written))
    write_index(folder, index=index)
    return index


def _write_streams(
    spec: DataSpec, *, folder: Path, digest: str, tokenizer: TextTokenizer, report: _Report
) -> CacheIndex:
    bad = BadRecords(action=spec.on_bad_record)
    packed = _pack(spec, folder=folder, tokenizer=tokenizer, split=_first_split(spec), report=report, bad=bad)
    second = _second_split(packed, held_out=spec.held_out)
    if second is not None:
        for path in folder.glob("*.tokens"):
            path.unlink()
        bad = BadRecords(action=spec.on_bad_record)
        packed = _pack(spec, folder=folder, tokenizer=tokenizer, split=second, report=report, bad=bad)
    return CacheIndex(
        digest=digest,
        dtype=tokenizer.dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        num_documents=packed.num_documents,
        num_text_bytes=packed.num_text_bytes,
        unigram_perplexity=unigram_perplexity(packed.train.counts, held_out_counts=packed.held_out.counts),
        train=packed.train.close(),
        held_out=packed.held_out.close(),
        tokenizer=(),
        skipped=SkippedRecords(count=bad.count, listed=tuple(bad.listed)),
    )


def _progress_of(report: _Report) -> Callable[[int, int, int], None]:
    return lambda documents, size, tokens: report(
        PrepareProgress(phase="tokens", num_documents=documents, num_text_bytes=size, num_tokens=tokens)
    )


def _pack(
    spec: DataSpec,
    *,
    folder: Path,
    tokenizer: TextTokenizer,
    split: Split,
    report: _Report,
    bad: BadRecords,
) -> Packer:
    packer = Packer(folder, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, split=split, seed=spec.seed)
    # The encoder is some batches ahead of the packer; tee keeps those in between.
    batches, ahead = itertools.tee(_batches(corpus.iter_documents(spec, bad=bad)))
    texts = ([document.text for document in batch] for batch in ahead)
    num_processes = min(usable_cpus(), MAX_PROCESSES)
    with closing(encode_batches(texts, tokenizer=tokenizer, num_processes=num_processes)) as encoded:
        try:
            for ids_of_batch, batch in zip(encoded, batches, strict=False):
                for document, ids in zip(batch, ids_of_batch, strict=True):
                    packer.add(document.text.encode(), ids=ids, starts=document.starts, ends=document.ends)
                report(_tokens_so_far(packer))
            packer.close()
        finally:
            packer.abort()
    return packer


def _tokens_so_far(packer: Packer) -> PrepareProgress:
    return PrepareProgress(
        phase="tokens",
        num_documents=packer.num_documents,
        num_text_bytes=packer.num_text_bytes,
        num_tokens=packer.num_tokens,
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _first_split(spec: DataSpec) -> Split:
    """Hold out documents in the order of their keys until they reach the share; at least one, never all.

    A corpus above `SMALL_CORPUS_CHARS` is split by the keys alone: among many documents, those with keys in the
    lowest 1 % have about 1 % of the text.
    """
    sizes: dict[int, int] = {}
    total = key = 0
    for document in corpus.iter_documents(spec) if spec.held_out else ():
        if document.starts:
            key = store.document_key(document.text.encode(), seed=spec.seed)
        sizes[key] = sizes.get(key, 0) + len(document.text)
        total += len(document.text)
        if total > SMALL_CORPUS_CHARS:
            return Split(key_below=int(spec.held_out * store.KEY_SPACE))
    keys = sorted(sizes)
    wanted = total * spec.held_out
    for key, following in itertools.pairwise(keys):
        wanted -= sizes[key]
        if wanted <= 0 or following == keys[-1]:
            return Split(key_below=following)
    return Split()


def _second_split(packed: Packer, *, held_out: float) -> Split | None:
    """Return another split if the first left one side empty: one document, or the end of the only one."""
    if held_out == 0 or (packed.train.num_tokens and packed.held_out.num_tokens):
        return None
    if packed.smallest_key < packed.largest_key:
        return Split(key_below=packed.smallest_key + 1)
    return Split(tail_from=packed.num_tokens - math.ceil(packed.num_tokens * held_out))
