"""How many examples of a task share 13 words in a row with what a run was trained on, as GPT-3 was checked.

The n-grams of the task are held as sorted hashes, 16 bytes each; the prepared training tokens are decoded and read
once, block by block, so memory grows with the task and not with the corpus. Shards of the corpus can be read in
parallel: counts add up.

Words are runs of letters and digits, in lower case, without punctuation. An example with 8 to 12 words is
compared as a whole, a shorter one not at all. An n-gram that the corpus has more than 10 times is a common phrase
(a licence, a prompt that all examples share) and does not count.

Source: Brown et al., "Language Models are Few-Shot Learners" (2020), appendix C.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer

from forge.data.cache_index import PARTS, read_index
from forge.data.example_store import ExampleRows
from forge.data.store import TokenStream
from forge.evaluate.task import TaskExample

Hashes = NDArray[np.uint64]

NGRAM_WORDS = 13
MIN_WORDS = 8
MAX_COUNT = 10
BLOCK_TOKENS = 1 << 18
_OVERLAP_TOKENS = 512
"""A block that begins within a document begins so many tokens earlier: 13 words of more tokens than that are not
found there, and those within it are counted twice."""

_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskNgrams:
    """The different n-grams of a task, and which example has which."""

    hashes: Hashes
    """Sorted."""
    members: NDArray[np.int64]
    """Numbers of n-grams, for one example after the other."""
    offsets: NDArray[np.int64]
    """Where the n-grams of an example begin in `members`. Shapes: [examples + 1]."""
    lengths: tuple[int, ...]
    """Words of the n-grams that occur."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contamination:
    """The examples of a task that overlap with the training data."""

    num_examples: int
    num_too_short: int
    """Examples with fewer than 8 words, which are not compared."""
    overlapping: tuple[int, ...]
    """Numbers of the examples, from 0."""

    @property
    def share(self) -> float:
        """Of the compared examples, how many overlap; NaN if none is compared."""
        num_compared = self.num_examples - self.num_too_short
        return len(self.overlapping) / num_compared if num_compared else float("nan")


def task_ngrams(examples: Sequence[TaskExample]) -> TaskNgrams:
    """The n-grams of what an example asks and of its answers; few-shot examples and instructions are left out."""
    found = [_example_ngrams(example.own_texts) for example in examples]
    sizes = [len(hashes) for hashes, _ in found]
    everything = np.concatenate([np.empty(0, dtype=np.uint64), *(hashes for hashes, _ in found)])
    hashes, members = np.unique(everything, return_inverse=True)
    return TaskNgrams(
        hashes=hashes,
        members=members.astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
        lengths=tuple(sorted({length for _, lengths in found for length in lengths})),
    )


def count_in_corpus(ngrams: TaskNgrams, texts: Iterable[str]) -> NDArray[np.int64]:
    """How often the corpus has each n-gram of a task. Shapes: [n-grams]."""
    counts = np.zeros(len(ngrams.hashes), dtype=np.int64)
    if not len(counts):
        return counts
    for text in texts:
        words = _word_hashes(text)
        for length in ngrams.lengths:
            found = _ngrams(words, length=length)
            at = np.searchsorted(ngrams.hashes, found).clip(max=len(counts) - 1)
            np.add.at(counts, at[ngrams.hashes[at] == found], 1)
    return counts


def overlaps(ngrams: TaskNgrams, *, counts: NDArray[np.int64]) -> Contamination:
    """Which examples have an n-gram that is in the corpus, and not a common phrase there."""
    is_shared = ((counts > 0) & (counts <= MAX_COUNT))[ngrams.members]
    sums = np.concatenate([[0], np.cumsum(is_shared)])
    shared = sums[ngrams.offsets[1:]] - sums[ngrams.offsets[:-1]]
    return Contamination(
        num_examples=len(ngrams.offsets) - 1,
        num_too_short=int((np.diff(ngrams.offsets) == 0).sum()),
        overlapping=tuple(np.flatnonzero(shared).tolist()),
    )


def training_texts(folder: Path, *, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
    """Decode what a run is trained on: the training tokens of prepared data, in texts of limited length.

    Args:
        folder: of the prepared data.
        shard, num_shards: which part of them; a document at a border of two shards of tokens is in both.

    Raises: DataError if the prepared data are missing or damaged.
    """
    index = read_index(folder)
    for part in index.parts:
        yield from training_texts(folder / PARTS / part.name, shard=shard, num_shards=num_shards)
    if index.parts:
        return
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    if index.examples is not None:
        blocks = _blocks_of_examples(ExampleRows(folder=folder, index=index, split="train"), shard, num_shards)
    else:
        stream = TokenStream(folder=folder, entries=index.train, dtype=index.dtype)
        blocks = _blocks_of_stream(stream, shard, num_shards, eot_id=index.eot_id)
    for block in blocks:
        yield from tokenizer.decode_batch([ids.tolist() for ids in block])


def _blocks_of_stream(
    stream: TokenStream, shard: int, num_shards: int, *, eot_id: int
) -> Iterator[list[NDArray[np.int64]]]:
    start, stop = (stream.num_tokens * one // num_shards for one in (shard, shard + 1))
    start = max(0, start - _OVERLAP_TOKENS)
    while start < stop:
        ids = stream.tokens(start, min(start + BLOCK_TOKENS, stop))
        ends = np.flatnonzero(ids == eot_id) + 1
        yield [part for part in np.split(ids, ends) if len(part)]
        start += len(ids)
        if start < stop:
            # The last document goes on in the next block.
            last = int(ends[-1]) if len(ends) else 0
            start -= min(len(ids) - last, _OVERLAP_TOKENS)


def _blocks_of_examples(rows: ExampleRows, shard: int, num_shards: int) -> Iterator[list[NDArray[np.int64]]]:
    first, stop = (rows.num_stored * one // num_shards for one in (shard, shard + 1))
    for start in range(first, stop, 1024):
        numbers = rows.numbers_between(start, min(start + 1024, stop))
        yield [rows.example(number)["tokens"].astype(np.int64) for number in numbers]


def _example_ngrams(texts: Sequence[str]) -> tuple[Hashes, set[int]]:
    """The n-grams of an example: 13 words, or all of 8 to 12."""
    words = _word_hashes("\n".join(texts))
    if len(words) < MIN_WORDS:
        return np.empty(0, dtype=np.uint64), set()
    length = min(len(words), NGRAM_WORDS)
    return np.unique(_ngrams(words, length=length)), {length}


def _word_hashes(text: str) -> Hashes:
    words = (xxhash.xxh64_intdigest(word.encode()) for word in _WORD.findall(text.lower()))
    return np.fromiter(words, dtype=np.uint64)


def _ngrams(words: Hashes, *, length: int) -> Hashes:
    """Hashes of all runs of so many words; the length is part of the hash. Shapes: [W] → [W - length + 1]."""
    count = max(0, len(words) - length + 1)
    found = np.full(count, length, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for at in range(length):
            found = found * _FACTOR + words[at : at + count]
    return found
