"""Plain text: every next token of a document is predicted, the end-of-text token last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from forge.data.corpus import text_of
from forge.data.formats.base import Example, FormatContext
from forge.data.sources.base import Record


class TextFormat:
    """A document of n tokens, its end-of-text token included, predicts n - 1 tokens.

    One longer than `seq_len` is split into examples of `seq_len` tokens and a rest; each begins without the text
    before it. The pieces of a very long document are split one by one.
    """

    def __init__(self, context: FormatContext) -> None:
        self._context = context
        self._num_split = 0

    def examples(self, record: Record) -> Iterator[Example]:
        context = self._context
        ids = context.encode(text_of(record, text_key=context.text_key))
        if record.ends:
            ids = np.append(ids, context.eot_id)
        num_targets = len(ids) - 1
        self._num_split += num_targets > context.seq_len or (record.starts and not record.ends)
        for start in range(0, num_targets, context.seq_len):
            end = min(start + context.seq_len, num_targets)
            arrays = {"tokens": ids[start:end], "targets": ids[start + 1 : end + 1]}
            yield Example(arrays=arrays, weight=float(end - start))

    def counts(self) -> Mapping[str, int]:
        return {"documents split at seq_len": self._num_split}
