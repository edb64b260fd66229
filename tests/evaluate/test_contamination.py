"""The contamination check finds planted overlaps, and only those, in streams, examples and shards."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from forge.config.data import DataSpec
from forge.data.prepare import prepare
from forge.evaluate import contamination
from forge.evaluate.contamination import count_in_corpus, overlaps, task_ngrams, training_texts
from forge.evaluate.task import TaskExample
from tests.support.seeds import SEED


def words(number: int, *, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(number))


def checked(examples: list[str], corpus: list[str]) -> contamination.Contamination:
    ngrams = task_ngrams([TaskExample(id=str(at), question=text) for at, text in enumerate(examples)])
    return overlaps(ngrams, counts=count_in_corpus(ngrams, corpus))


def test_overlaps__planted_words__are_found_whatever_their_case_and_punctuation() -> None:
    text = words(20, seed=1)
    planted = ", ".join(text.upper().split()[3:16]) + "!"
    found = checked([text, words(20, seed=2), "too short"], [words(50, seed=3), f"x {planted} y"])
    assert found.overlapping == (0,) and found.num_too_short == 1 and found.share == 0.5


@pytest.mark.parametrize(("number", "is_found"), [(12, False), (13, True)])
def test_overlaps__shared_words__count_from_13(number: int, is_found: bool) -> None:
    text = words(30, seed=1)
    assert bool(checked([text], ["a b " + " ".join(text.split()[:number]) + " c"]).overlapping) is is_found


@pytest.mark.parametrize(("number", "num_too_short"), [(7, 1), (8, 0), (12, 0)])
def test_overlaps__short_example__is_compared_as_a_whole_from_8(number: int, num_too_short: int) -> None:
    text = words(number, seed=1)
    found = checked([text], [f"a {text} b"])
    assert found.num_too_short == num_too_short and len(found.overlapping) == 1 - num_too_short
    assert not checked([text], [f"a {text[:-1]} b"]).overlapping


def test_overlaps__common_phrase__does_not_count() -> None:
    text = words(13, seed=1)
    assert checked([text], [text] * 10).overlapping == (0,)
    assert checked([text], [text] * 11).overlapping == ()


def test_overlaps__target__is_part_of_the_example() -> None:
    text = words(16, seed=1).split()
    example = TaskExample(id="a", question=" ".join(text[:8]), target=" ".join(text[8:]))
    ngrams = task_ngrams([example])
    assert overlaps(ngrams, counts=count_in_corpus(ngrams, [" ".join(text)])).overlapping == (0,)


def test_overlaps__nothing_or_odd_texts__do_not_fail() -> None:
    assert np.isnan(checked([], ["a"]).share)
    assert np.isnan(checked(["", "\x00 \ud800 ..."], [""]).share)
    assert checked(["é " * 20], ["É " * 20]).overlapping == (0,)


def prepared(tmp_path: Path, texts: list[str], *, packing: str) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    body = {"files": (str(path),), "tokenizer": {"vocab_size": 300}, "seq_len": 32, "packing": packing}
    return Path(prepare(DataSpec.model_validate(body | {"held_out": 0.1}), cache_dir=tmp_path / "cache").folder)


@pytest.mark.parametrize("packing", ["concatenate", "none"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_training_texts__blocks_and_shards__lose_no_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, num_shards: int
) -> None:
    monkeypatch.setattr(contamination, "BLOCK_TOKENS", 1000)
    texts = [words(20 if packing == "none" else 5 + at * 5, seed=SEED + at) for at in range(60)]
    if packing == "none":
        texts = [text[:30] for text in texts]  # an example is at most one row
    folder = prepared(tmp_path, texts, packing=packing)
    whole = "\n".join(training_texts(folder))
    examples = [TaskExample(id=str(at), question=text) for at, text in enumerate(texts)]
    monkeypatch.setattr(contamination, "MIN_WORDS", 2)
    ngrams = task_ngrams(examples)
    counts = np.zeros(len(ngrams.hashes), dtype=np.int64)
    for shard in range(num_shards):
        counts += count_in_corpus(ngrams, training_texts(folder, shard=shard, num_shards=num_shards))
    found = overlaps(ngrams, counts=counts).overlapping
    assert found == tuple(at for at, text in enumerate(texts) if text.split()[0] in whole)
    assert 0 < len(found) < len(texts), "held-out documents are not trained on"
