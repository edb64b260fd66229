"""Pairs of texts: an encoder reads the source, a decoder learns to write the target.

An example has the tokens of both, one after the other; `part` is 1 in the source and 2 in the target. Targets of
the second part are its own tokens: the model itself shifts them to what its decoder reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from forge.data.formats.base import Example, FormatContext
from forge.data.pairs import pair_of
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.data.text_frame import text_frame
from forge.errors import DataError

SOURCE, TARGET = 1, 2
"""Values of `part`."""

_CUT = "sources cut at seq_len"
_MAX_CHARS_PER_TOKEN = 256
"""A text with more characters for each token of a row is not a long one but another kind of record."""


class PairFormat:
    """One example for a record; the tokens of both texts and what is around them fit into `seq_len`."""

    def __init__(self, context: FormatContext) -> None:
        self._context, self._spec = context, context.pair
        self._frame = text_frame(context.tokenizer)
        self._most_chars = context.seq_len * _MAX_CHARS_PER_TOKEN

    def examples(self, record: Record) -> Iterator[Example]:
        pair = pair_of(record, spec=self._spec)
        target = self._frame.around(self._encoded(pair.target, of="target", record=record))
        text = self._spec.prefix + pair.source
        if self._spec.truncation == "source":
            text = text[: self._most_chars]  # of what is left nothing more would fit
        source = self._encoded(text, of="source", record=record)
        source = self._fitting(source, room=self._context.seq_len - len(target), record=record)
        tokens = np.concatenate([source, target])
        part = np.repeat([SOURCE, TARGET], [len(source), len(target)])
        arrays = {"tokens": tokens, "targets": np.where(part == TARGET, tokens, IGNORED), "part": part}
        yield Example(arrays=arrays, weight=float(len(target)))

    def counts(self) -> Mapping[str, int]:
        return self._context.noted.counts

    def _encoded(self, text: str, *, of: str, record: Record) -> NDArray[np.int64]:
        """Token ids of a text. Raises: DataError if it is too long to be cut with reason."""
        if len(text) > self._most_chars:
            raise DataError(
                f"{record.location}: the {of} has {len(text):,} characters, more than {self._most_chars:,}, far "
                f"beyond data.seq_len: {self._context.seq_len}"
            )
        return self._context.encode(text)

    def _fitting(self, ids: NDArray[np.int64], *, room: int, record: Record) -> NDArray[np.int64]:
        """The tokens of a source with those around it, cut if `data.pair.truncation` says so.

        Raises: DataError if it does not fit.
        """
        limit, extra = self._context.seq_len, self._frame.num_tokens
        most = room - extra
        if len(ids) > most and (self._spec.truncation == "none" or most < 1):
            remedy = (
                "raise data.seq_len, or set data.pair.truncation: source" if most >= 1 else "raise data.seq_len"
            )
            source, target = len(ids) + extra, limit - room
            raise DataError(
                f"{record.location}: the pair has {source + target:,} tokens (source {source:,}, target "
                f"{target:,}), more than data.seq_len: {limit}; {remedy}"
            )
        self._context.noted.add(_CUT, record, count=len(ids) > most)
        return self._frame.around(ids[:most])
