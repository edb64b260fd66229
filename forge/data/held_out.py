"""The records of a corpus that a run does not train on, as they are in its source.

Which these are follows from the keys of their content and the smallest key that is trained on, which the index of
the prepared data records; so they are found by one pass over the source, without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from forge.config.data import DataSpec
from forge.data.bad_records import BadRecords
from forge.data.cache_index import PARTS, CacheIndex, read_index
from forge.data.corpus import text_of
from forge.data.mixture_parts import each_part
from forge.data.prepare_examples import record_content
from forge.data.sources.base import Record
from forge.data.sources.build import build_source
from forge.data.sources.pieces import blocks_of, pieces_of
from forge.data.store import document_key
from forge.errors import DataError


def held_out_of_run(spec: DataSpec, *, folder: Path) -> Iterator[Record]:
    """Yield the held-out records of a run; of a mixture, part after part.

    Args:
        spec: the data of the run.
        folder: of its prepared data.

    Raises: DataError as `held_out_records`.
    """
    if not spec.mixture:
        return held_out_records(spec, index=read_index(folder))
    return chain.from_iterable(
        each_part(spec, lambda name, part: held_out_records(part, index=read_index(folder / PARTS / name)))
    )


def held_out_records(spec: DataSpec, *, index: CacheIndex) -> Iterator[Record]:
    """Yield the held-out records, in the order of the source.

    Args:
        spec: the data of the run.
        index: of its prepared data.

    Raises: DataError if the run holds nothing out, or its prepared data do not say which records those are.
    """
    if not spec.held_out:
        raise DataError("the run has no held-out records: its data.held_out is 0")
    if index.held_out_below is None:
        raise DataError(
            "the prepared data do not say which records are held out: they are the end of a single document, or "
            "were prepared by an older forge; prepare them again, or give the task files of its own"
        )
    below = int(index.held_out_below, 16)
    bad = BadRecords(action=spec.on_bad_record)
    is_held_out = False
    for record in bad.usable(build_source(spec).records()):
        if record.starts or spec.packing != "concatenate":
            try:
                is_held_out = document_key(_content(record, spec=spec), seed=spec.seed) < below
            except DataError as error:
                bad.add(str(error))
                is_held_out = False
        if is_held_out:
            yield record
    bad.close()


def _content(record: Record, *, spec: DataSpec) -> bytes:
    """What the key of a record is computed of, as `prepare_streams` and `prepare_examples` do."""
    if spec.packing != "concatenate":
        return record_content(record, text_key=spec.text_key)
    text = text_of(record, text_key=spec.text_key)
    first = next(pieces_of(blocks_of(text)), None)
    return b"" if first is None else first.text.encode()
