"""Span corruption against the published algorithm of T5."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from forge.config.training import SpanCorruptionSpec
from forge.objective.base import IGNORED
from forge.objective.registry import SENTINELS
from forge.objective.span_corruption import SpanCorruption
from forge.objective.spans import draw_spans, random_segmentation, show_spans, with_sentinels
from tests.support.objectives import context_of

EOT, FIRST_SENTINEL = 0, 2


def published_mask(length: int, *, share: float, mean: float, seed: int) -> np.ndarray:
    """`random_spans_noise_mask` of t5/data/preprocessors.py, operation by operation in numpy."""
    draw = np.random.Generator(np.random.Philox(key=seed))
    num_noise_tokens = min(max(int(np.round(length * share)), 1), length - 1)
    num_noise_spans = max(int(np.round(num_noise_tokens / mean)), 1)
    num_nonnoise_tokens = length - num_noise_tokens

    def random_segmentation(num_items: int, num_segments: int) -> np.ndarray:
        first_in_segment = np.pad(draw.permutation(np.arange(num_items - 1) < num_segments - 1), [[1, 0]])
        segment_id = np.cumsum(first_in_segment)
        return np.bincount(segment_id)

    noise_span_lengths = random_segmentation(num_noise_tokens, num_noise_spans)
    nonnoise_span_lengths = random_segmentation(num_nonnoise_tokens, num_noise_spans)
    interleaved = np.reshape(np.stack([nonnoise_span_lengths, noise_span_lengths], axis=1), [num_noise_spans * 2])
    span_starts = np.cumsum(interleaved)[:-1]
    span_start_indicator = np.bincount(span_starts, minlength=length)
    return np.cumsum(span_start_indicator) % 2 == 1


def published_sentinels(tokens: np.ndarray, noise_mask: np.ndarray, *, first: int) -> np.ndarray:
    """`noise_span_to_unique_sentinel`, with sentinels that count upwards."""
    prev_token_is_noise = np.pad(noise_mask[:-1], [[1, 0]])
    first_noise_tokens = noise_mask & ~prev_token_is_noise
    subsequent_noise_tokens = noise_mask & prev_token_is_noise
    sentinel = first - 1 + np.cumsum(first_noise_tokens)
    return np.where(first_noise_tokens, sentinel, tokens)[~subsequent_noise_tokens]


@pytest.mark.parametrize("length", [2, 5, 20, 128, 513])
@pytest.mark.parametrize(("share", "mean"), [(0.15, 3.0), (0.5, 1.0), (0.3, 8.0)])
def test_draw_spans__any_length__is_the_published_mask(length: int, share: float, mean: float) -> None:
    spec = SpanCorruptionSpec(share=share, mean_length=mean)
    sentinels = np.arange(1000, 2000)
    tokens = np.arange(length)
    for seed in range(5):
        found = draw_spans(length, spec=spec, draw=np.random.Generator(np.random.Philox(key=seed)))
        assert found.tolist() == published_mask(length, share=share, mean=mean, seed=seed).tolist()
        for mask in (found, ~found):
            expected = published_sentinels(tokens, mask, first=1000)
            assert with_sentinels(tokens, mask, sentinels=sentinels).tolist() == expected.tolist()


def test_draw_spans__defaults__have_the_published_share_and_lengths() -> None:
    draw = np.random.default_rng(1)
    masks = [draw_spans(512, spec=SpanCorruptionSpec(), draw=draw) for _ in range(200)]
    lengths = [len(list(run)) for mask in masks for is_noise, run in groupby(mask) if is_noise]
    assert {int(mask.sum()) for mask in masks} == {77}  # 15 % of 512
    assert len(lengths) == 200 * 26 and np.mean(lengths) == pytest.approx(77 / 26)
    share_by_place = np.mean(masks, axis=0)
    assert share_by_place[100:400].mean() == pytest.approx(0.15, abs=0.01)


def test_random_segmentation__three_of_five__are_equally_likely() -> None:
    draw = np.random.default_rng(2)
    drawn = [tuple(random_segmentation(5, 3, draw=draw).tolist()) for _ in range(3000)]
    assert len(set(drawn)) == 6  # choose(4, 2)
    assert all(drawn.count(one) == pytest.approx(500, abs=100) for one in set(drawn))


def rows_of(*lengths: int, seq_len: int = 96) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(3).integers(110, 300, size=(2, seq_len))
    segment_ids = np.zeros((2, seq_len), dtype=np.int64)
    segment_ids[:, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return {
        "tokens": tokens,
        "targets": np.where(segment_ids > 0, tokens, IGNORED),
        "segment_ids": segment_ids,
        "row_seeds": np.array([7, 8], dtype=np.uint64),
    }


def rebuilt(source: list[int], target: list[int]) -> list[int]:
    """The text of a corrupted pair."""
    assert source[-1] == target[-1] == EOT
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if FIRST_SENTINEL <= token < FIRST_SENTINEL + len(SENTINELS):
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [one for token in source[:-1] for one in spans.get(token, [token])]


def test_batch__packed_texts__can_be_rebuilt_and_draw_other_spans_in_every_row(tmp_path: Path) -> None:
    objective = SpanCorruption(context=context_of(tmp_path, objective="span-corruption"))
    rows = rows_of(60, 35, 1)
    batch = objective.batch(rows)
    sources = [s[m > 0].tolist() for s, m in zip(batch["source"], batch["attention_mask"], strict=True)]
    targets = [labels[labels != IGNORED].tolist() for labels in batch["labels"]]
    texts = [
        list(rows["tokens"][row, start:stop]) for row in (0, 1) for start, stop in ((0, 60), (60, 95), (95, 96))
    ]
    found = [rebuilt(*pair) for pair in zip(sources, targets, strict=True)]
    assert found[:2] == texts[:2] and found[3:5] == texts[3:5]
    assert batch["sequence_rows"].tolist() == [0, 0, 0, 1, 1, 1]
    assert objective.weight(batch) == sum(map(len, targets))
    again = objective.batch(rows)
    assert all(bool((again[name] == batch[name]).all()) for name in batch)
    other = objective.batch(rows | {"row_seeds": np.array([9, 8], dtype=np.uint64)})
    assert other["labels"][0].tolist() != batch["labels"][0].tolist()


def test_batch__row_that_fills_up__has_no_labels(tmp_path: Path) -> None:
    objective = SpanCorruption(context=context_of(tmp_path, objective="span-corruption"))
    rows = rows_of(30)
    rows["targets"][1] = IGNORED
    batch = objective.batch(rows)
    assert (batch["labels"][0] != IGNORED).any() and not (batch["labels"][1] != IGNORED).any()


def test_show_spans__an_example__is_the_source_and_the_target_that_a_step_may_draw(tmp_path: Path) -> None:
    context = context_of(tmp_path, objective="span-corruption")
    tokens = np.arange(110, 170)
    shown = show_spans({"tokens": tokens}, seed=3, training=context.training, tokenizer=tmp_path)
    source, target = (shown["tokens"][shown["part"] == part].tolist() for part in (1, 2))
    assert rebuilt(source, target) == tokens.tolist()
    assert shown["targets"].tolist() == [IGNORED] * len(source) + target
