"""Pretraining of encoder-decoders: spans of a text are replaced by sentinels, and the decoder writes the spans.

    text      Thank you for inviting me to your party last week
    source    Thank you <extra_id_0> me to your party <extra_id_1> week
    target    <extra_id_0> for inviting <extra_id_1> last

Both end with the end of text. As in T5's own code, a sequence begins with a part that is kept and ends with a span.

Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", arXiv
1910.10683, section 3.1.4; `random_spans_noise_mask` of google-research/text-to-text-transfer-transformer,
t5/data/preprocessors.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from forge.config.training import SpanCorruptionSpec
from forge.data.tokenizer_files import role_token, special_ids
from forge.errors import DataError
from forge.objective.base import IGNORED, Arrays, ObjectiveContext
from forge.objective.examples import sequence_seeds, sequences_of
from forge.objective.registry import SENTINELS
from forge.objective.seq2seq import Seq2Seq, tensors


class SpanCorruption(Seq2Seq):
    """The loss of `seq2seq` for pairs that are drawn from a text, others in every step."""

    def __init__(self, *, context: ObjectiveContext) -> None:
        self._spec = context.training.spans
        ids = special_ids(context.tokenizer)
        missing = [token for token in SENTINELS if token not in ids]
        end = role_token(context.tokenizer, "eos_token")
        if missing:
            raise DataError(f"the tokenizer in {context.tokenizer} has no {missing[0]}")
        if end is None or end not in ids:
            raise DataError(f"the tokenizer in {context.tokenizer} names no end of text")
        self._sentinels = np.array([ids[token] for token in SENTINELS], dtype=np.int64)
        self._end = ids[end]

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Replace spans; a sequence of a single token has none, and is learnt as it is."""
        texts = sequences_of(rows)
        is_filler = (rows["targets"] == IGNORED).all(axis=1)[texts.rows]
        seeds = sequence_seeds(rows["row_seeds"], texts.rows)
        pairs = [
            self._pair(tokens[is_token], seed=seed)
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

    def _pair(self, tokens: NDArray[np.int64], *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        draw = np.random.Generator(np.random.Philox(key=seed))
        is_noise = draw_spans(len(tokens), spec=self._spec, draw=draw)
        parts = (with_sentinels(tokens, mask, sentinels=self._sentinels) for mask in (is_noise, ~is_noise))
        source, target = (np.append(part, self._end) for part in parts)
        return source, target


def draw_spans(length: int, *, spec: SpanCorruptionSpec, draw: np.random.Generator) -> NDArray[np.bool_]:
    """Draw which tokens of a text are noise: an exact number, in an exact number of spans of random lengths.

    All divisions of the noise into spans, and of the rest into the parts between them, are equally likely.

    Shapes: returns bool[length].
    """
    if length < 2:
        return np.zeros(length, dtype=np.bool_)
    num_noise, num_spans = spec.num_noise_tokens(length), spec.num_spans(length)
    noise = random_segmentation(num_noise, num_spans, draw=draw)
    rest = random_segmentation(length - num_noise, num_spans, draw=draw)
    lengths = np.stack([rest, noise], axis=1).reshape(-1)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def random_segmentation(num_items: int, num_segments: int, *, draw: np.random.Generator) -> NDArray[np.int64]:
    """Divide items into segments of at least one, uniformly. Shapes: returns int64[num_segments]."""
    is_first = draw.permutation(np.arange(num_items - 1) < num_segments - 1)
    starts = np.concatenate([[0], np.flatnonzero(is_first) + 1, [num_items]])
    lengths: NDArray[np.int64] = np.diff(starts)
    return lengths


def with_sentinels(
    tokens: NDArray[np.int64], is_span: NDArray[np.bool_], *, sentinels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Replace each span by the next sentinel. Shapes: tokens: int64[n]; is_span: bool[n]."""
    is_first = is_span & ~np.concatenate([[False], is_span[:-1]])
    replaced = np.where(is_first, sentinels[np.maximum(np.cumsum(is_first) - 1, 0)], tokens)
    kept: NDArray[np.int64] = replaced[is_first | ~is_span]
    return kept


def _padded(sequences: list[NDArray[np.int64]], *, padding: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    lengths = np.array([len(one) for one in sequences])
    inside = np.arange(lengths.max()) < lengths[:, None]
    found = np.full(inside.shape, padding, dtype=np.int64)
    found[inside] = np.concatenate(sequences)
    return found, inside
