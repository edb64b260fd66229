"""Pretraining of encoder-decoders: spans of a text are replaced by sentinels, and the decoder writes the spans."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from forge.objective.base import IGNORED, Arrays, ObjectiveContext
from forge.objective.examples import sequence_seeds, sequences_of
from forge.objective.seq2seq import Seq2Seq, tensors
from forge.objective.spans import SentinelTokens, corrupted


class SpanCorruption(Seq2Seq):
    """The loss of `seq2seq` for pairs that are drawn from a text, others in every step."""

    def __init__(self, *, context: ObjectiveContext) -> None:
        super().__init__()
        self._spec = context.training.spans
        self._special = SentinelTokens.of(context.tokenizer)

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Replace spans; a sequence of a single token has none, and is learnt as it is."""
        texts = sequences_of(rows)
        is_filler = (rows["targets"] == IGNORED).all(axis=1)[texts.rows]
        seeds = sequence_seeds(rows["row_seeds"], texts.rows)
        pairs = [
            corrupted(tokens[is_token], special=self._special, spec=self._spec, seed=seed)
            for tokens, is_token, seed in zip(texts.arrays["tokens"], texts.is_token, seeds.tolist(), strict=True)
        ]
        source, is_token = _padded([pair[0] for pair in pairs], padding=0)
        labels, _ = _padded([pair[1] for pair in pairs], padding=IGNORED)
        labels[is_filler] = IGNORED
        return tensors(
            source=source,
            is_token=is_token,
            labels=labels,
            sequence_rows=texts.rows if "segment_ids" in rows else None,
        )

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        """The number of labels, sentinels and ends of text included."""
        return float((batch["labels"] != IGNORED).sum())


def _padded(sequences: list[NDArray[np.int64]], *, padding: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    lengths = np.array([len(one) for one in sequences])
    inside = np.arange(lengths.max()) < lengths[:, None]
    found = np.full(inside.shape, padding, dtype=np.int64)
    found[inside] = np.concatenate(sequences)
    return found, inside
