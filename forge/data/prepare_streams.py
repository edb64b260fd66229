"""Prepare token streams from documents, for `packing: concatenate`.

Processes encode batches of text; one process reads, splits and writes. A small corpus is read twice, to hold out
exactly the requested share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from forge.config.data import DataSpec
from forge.data import corpus, store
from forge.data.bad_records import BadRecords
from forge.data.cache_index import CacheIndex, SkippedRecords
from forge.data.corpus import Document
from forge.data.lengths import lengths_of
from forge.data.sources.build import SampleSize
from forge.data.store import Packer, Split
from forge.data.tokenizer import TextTokenizer, encode_batches
from forge.data.unigram import unigram_perplexity
from forge.limits import usable_cpus

SMALL_CORPUS_CHARS = 1 << 26
"""Up to this size a corpus is read twice (half a second), to hold out exactly the requested share."""

MAX_PROCESSES = 16
"""With more, the single process that reads and writes is the bottleneck."""

_BATCH_CHARS = 1 << 20
"""Text per encoding batch; 0.1 s of one process."""


def write_streams(
    spec: DataSpec,
    *,
    folder: Path,
    digest: str,
    tokenizer: TextTokenizer,
    report: Callable[[int, int, int], None],
    sample: SampleSize | None = None,
) -> CacheIndex:
    """Write the training and the held-out tokens. Returns: the index, without the files of the tokenizer.

    Args:
        report: called with the number of documents, bytes and tokens so far.
        sample: how much of the source is read; None: everything.

    Raises: DataError if a record cannot be used; OSError.
    """
    pack = partial(_pack, spec, folder=folder, tokenizer=tokenizer, report=report, sample=sample)
    bad = BadRecords(action=spec.on_bad_record, is_sample=sample is not None)
    packed = pack(split=_first_split(spec, sample=sample), bad=bad)
    second = _second_split(packed, held_out=spec.held_out)
    if second is not None:
        for path in folder.glob("*.tokens"):
            path.unlink()
        bad = BadRecords(action=spec.on_bad_record, is_sample=sample is not None)
        packed = pack(split=second, bad=bad)
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
        lengths=lengths_of(packed.lengths),
        held_out_below=f"{packed.split.key_below:x}" if packed.split.tail_from is None else None,
    )


def _pack(
    spec: DataSpec,
    *,
    folder: Path,
    tokenizer: TextTokenizer,
    split: Split,
    report: Callable[[int, int, int], None],
    bad: BadRecords,
    sample: SampleSize | None,
) -> Packer:
    packer = Packer(folder, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, split=split, seed=spec.seed)
    # The encoder is some batches ahead of the packer; tee keeps those in between.
    batches, ahead = itertools.tee(_batches(corpus.iter_documents(spec, bad=bad, sample=sample)))
    texts = ([document.text for document in batch] for batch in ahead)
    num_processes = min(usable_cpus(), MAX_PROCESSES)
    with closing(encode_batches(texts, tokenizer=tokenizer, num_processes=num_processes)) as encoded:
        try:
            for ids_of_batch, batch in zip(encoded, batches, strict=False):
                for document, ids in zip(batch, ids_of_batch, strict=True):
                    packer.add(document.text.encode(), ids=ids, starts=document.starts, ends=document.ends)
                report(packer.num_documents, packer.num_text_bytes, packer.num_tokens)
            packer.close()
        finally:
            packer.abort()
    return packer


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


def _first_split(spec: DataSpec, *, sample: SampleSize | None) -> Split:
    """Hold out documents in the order of their keys until they reach the share; at least one, never all.

    A corpus above `SMALL_CORPUS_CHARS` is split by the keys alone: among many documents, those with keys in the
    lowest 1 % have about 1 % of the text.
    """
    sizes: dict[int, int] = {}
    total = key = 0
    for document in corpus.iter_documents(spec, sample=sample) if spec.held_out else ():
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
