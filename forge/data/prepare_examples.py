"""Prepare examples and rows from records, for `packing: examples` and `packing: none`.

One process reads, formats and writes. The layout counts by reason what was split or dropped.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.config.data import DataSpec
from forge.data.corpus import no_text
from forge.data.example_store import ExampleWriter, write_rows
from forge.data.formats.base import Example, ExampleFormat, FormatContext
from forge.data.formats.build import build_format
from forge.data.packing import pack_rows
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.data.sources.build import build_source
from forge.data.store import CacheIndex, document_key
from forge.data.tokenizer import Encoder, TextTokenizer
from forge.data.unigram import unigram_perplexity
from forge.errors import DataError, UserCodeError
from forge.user_code import describe_error

_BLOCK = 1 << 16
"""Examples counted at once."""


def write_examples(
    spec: DataSpec,
    *,
    folder: Path,
    digest: str,
    tokenizer: TextTokenizer,
    report: Callable[[int, int, int], None],
) -> CacheIndex:
    """Write all examples and the row tables. Returns: the index, without the files of the tokenizer.

    Args:
        report: called with the number of documents, bytes and tokens so far.

    Raises: DataError if a record or an example is not valid, or there is none; UserCodeError; OSError.
    """
    encoder = Encoder(tokenizer)
    context = FormatContext(
        seq_len=spec.seq_len,
        text_key=spec.text_key,
        eot_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        encode=lambda text: np.frombuffer(encoder.encode([text])[0], dtype=tokenizer.dtype).astype(np.int64),
    )
    example_format = build_format(spec.format, context=context)
    writer = ExampleWriter(folder, seq_len=spec.seq_len, vocab_size=tokenizer.vocab_size)
    totals = {"documents": 0, "bytes": 0, "without an example": 0, "without a target": 0}
    try:
        for record in build_source(spec).records():
            _add_record(record, writer=writer, example_format=example_format, spec=spec, totals=totals)
            if totals["documents"] % 1000 == 0:
                report(totals["documents"], totals["bytes"], writer.num_tokens)
        if not totals["documents"]:
            raise no_text(spec)
        tables = writer.close()
    finally:
        writer.abort()
    notes = {
        "records without an example": totals["without an example"],
        "examples of weight 0 dropped": totals["without a target"],
        **example_format.counts(),
    }
    notes = {reason: count for reason, count in notes.items() if count}
    if not writer.num_examples:
        found = ", ".join(f"{count} {reason}" for reason, count in notes.items())
        raise DataError(f"the corpus has no training example ({totals['documents']} records: {found})")
    is_held_out = _choose_held_out(writer.keys, writer.lengths, share=spec.held_out)
    splits: dict[str, Any] = {}
    for name, chosen in (("train", np.flatnonzero(~is_held_out)), ("held_out", np.flatnonzero(is_held_out))):
        rows = _rows(chosen, writer.lengths[chosen], spec=spec)
        (folder / name).mkdir()
        tables += write_rows(folder, name=name, rows=rows, examples=writer)
        splits[name] = {
            "num_rows": len(rows),
            "num_examples": len(chosen),
            "num_tokens": int(writer.lengths[chosen].sum()),
            "num_targets": int(writer.num_targets[chosen].sum()),
        }
    unigram = None
    if spec.format == "text":
        unigram = _unigram(folder, writer, is_held_out=is_held_out, vocab_size=tokenizer.vocab_size)
    return CacheIndex(
        digest=digest,
        dtype=tokenizer.dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        num_documents=totals["documents"],
        num_text_bytes=totals["bytes"],
        unigram_perplexity=unigram,
        train=(),
        held_out=(),
        tokenizer=(),
        tables=tuple(tables),
        examples={
            "seq_len": spec.seq_len,
            "packing": spec.packing,
            "columns": [asdict(column) for column in writer.columns],
            "notes": notes,
            **splits,
        },
    )


def _add_record(
    record: Record,
    *,
    writer: ExampleWriter,
    example_format: ExampleFormat,
    spec: DataSpec,
    totals: dict[str, int],
) -> None:
    content = _content(record, text_key=spec.text_key)
    totals["bytes"] += len(content)
    totals["documents"] += record.starts
    key = document_key(content, seed=spec.seed)
    num_examples = 0
    location = f"{record.location} (format {type(example_format).__name__})"
    for example in _examples_of(record, example_format=example_format, location=location):
        num_examples += 1
        weight = getattr(example, "weight", None)
        if isinstance(weight, int | float | np.integer | np.floating) and weight == 0:
            totals["without a target"] += 1
        else:
            writer.add(example, key=key, location=location)
    totals["without an example"] += record.starts and not num_examples


def _examples_of(record: Record, *, example_format: ExampleFormat, location: str) -> Iterator[Example]:
    """The examples of a record. Raises: DataError with the user's line if the format fails."""
    try:
        yield from example_format.examples(record)
    except (DataError, UserCodeError):
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        last = f"{Path(frame.filename).name}:{frame.lineno}"
        raise DataError(f"{location}: {describe_error(error, fallback=last)}") from error


def _content(record: Record, *, text_key: str) -> bytes:
    """The content that decides whether a record is held out; equal records are on the same side."""
    text = record.fields.get(text_key)
    if isinstance(text, str) and len(record.fields) == 1:
        return text.encode(errors="surrogatepass")
    return json.dumps(record.fields, sort_keys=True, default=repr).encode()


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


def _unigram(
    folder: Path, examples: ExampleWriter, *, is_held_out: NDArray[np.bool_], vocab_size: int
) -> float | None:
    """The perplexity of a unigram model on the held-out targets."""
    counts = np.zeros((2, vocab_size), dtype=np.int64)
    for targets, side in _targets_by_side(folder, examples, is_held_out=is_held_out):
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
