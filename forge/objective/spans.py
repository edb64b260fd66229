"""Which spans of a text are replaced by sentinels, and the source and the target that this makes; without torch.

    text      Thank you for inviting me to your party last week
    source    Thank you <extra_id_0> me to your party <extra_id_1> week
    target    <extra_id_0> for inviting <extra_id_1> last

Both end with the end of text. As in T5's own code, a sequence begins with a part that is kept and ends with a span.

Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", arXiv
1910.10683, section 3.1.4; `random_spans_noise_mask` of google-research/text-to-text-transfer-transformer,
t5/data/preprocessors.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forge.config.training import SpanCorruptionSpec, TrainingSpec
from forge.data.rows import IGNORED, Arrays
from forge.data.tokenizer_files import role_token, special_ids
from forge.errors import DataError
from forge.objective.registry import SENTINELS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SentinelTokens:
    """What span corruption must know of a vocabulary. Shapes: sentinels: int64[100]."""

    sentinels: NDArray[np.int64]
    eot_id: int

    @classmethod
    def of(cls, folder: Path) -> SentinelTokens:
        """Read them from a tokenizer's folder. Raises: DataError if it lacks one, or cannot be read."""
        ids, end = special_ids(folder), role_token(folder, "eos_token")
        missing = [token for token in SENTINELS if token not in ids]
        if missing:
            raise DataError(f"the tokenizer in {folder} has no {missing[0]}")
        if end is None or end not in ids:
            raise DataError(f"the tokenizer in {folder} names no end of text")
        return cls(sentinels=np.array([ids[token] for token in SENTINELS], dtype=np.int64), eot_id=ids[end])


def corrupted(
    tokens: NDArray[np.int64], *, special: SentinelTokens, spec: SpanCorruptionSpec, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the source and the target of a text. Shapes: tokens: int64[n]."""
    is_noise = draw_spans(len(tokens), spec=spec, draw=np.random.Generator(np.random.Philox(key=seed)))
    parts = (with_sentinels(tokens, mask, sentinels=special.sentinels) for mask in (is_noise, ~is_noise))
    source, target = (np.append(part, special.eot_id) for part in parts)
    return source, target


def show_spans(arrays: Arrays, *, seed: int, training: TrainingSpec, tokenizer: Path) -> Arrays:
    """Corrupt one example as a step might; every step draws other spans.

    Shapes: arrays: `tokens` int[n] and others. Returns: source and target, one after the other, with their `part`.
    """
    tokens = np.asarray(arrays["tokens"], dtype=np.int64)
    source, target = corrupted(tokens, special=_special_of(tokenizer), spec=training.spans, seed=seed)
    part = np.repeat([1, 2], [len(source), len(target)])
    both = np.concatenate([source, target])
    return {"tokens": both, "targets": np.where(part == 2, both, IGNORED), "part": part}


@lru_cache(maxsize=1)
def _special_of(tokenizer: Path) -> SentinelTokens:
    return SentinelTokens.of(tokenizer)


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
