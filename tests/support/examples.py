"""Prepared examples: with random masked targets, preference pairs, and texts that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forge.data.cache_index import CacheIndex, ExampleLayout, SplitSizes, write_index
from forge.data.example_store import ExampleWriter, write_rows
from forge.data.formats.base import Example
from forge.data.packing import pack_rows
from forge.data.rows import IGNORED
from forge.plan.inputs import CorpusInfo
from tests.support.jobs import SEQ_LEN, VOCAB


def masked_corpus(folder: Path, *, packing: str, num_examples: int = 160) -> CorpusInfo:
    """Examples of 2 to SEQ_LEN tokens, of whose targets one to all are predicted; a tenth is held out."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(num_examples):
        length = int(rng.integers(2, SEQ_LEN + 1))
        ids = rng.integers(0, VOCAB, size=length + 1)
        ids[1::2] = (ids[:-1:2] * 5 + 3) % VOCAB
        targets = ids[1:].copy()
        targets[rng.permutation(length)[: rng.integers(0, length)]] = IGNORED
        weight = float((targets != IGNORED).sum())
        examples.append(Example(arrays={"tokens": ids[:-1], "targets": targets}, weight=weight))
    return example_corpus(folder, examples, packing=packing, digest=f"masked-{packing}")


def pair_corpus(folder: Path, *, packing: str = "examples", num_pairs: int = 80) -> CorpusInfo:
    """Preference pairs: in chosen answers each token follows from the one before, in rejected ones none does."""
    rng = np.random.default_rng(1)
    examples = []
    for _ in range(num_pairs):
        prompt = rng.integers(1, VOCAB, size=int(rng.integers(1, 3))).tolist()
        arrays: dict[str, list[NDArray[np.int64]]] = {"tokens": [], "targets": [], "part": []}
        for part in (1, 2):
            answer: list[int] = []
            for _ in range(int(rng.integers(1, 4))):
                last = [*prompt, *answer][-1]
                answer.append(int((last * 5 + 3) % VOCAB if part == 1 else rng.integers(1, VOCAB)))
            ids = np.array([*prompt, *answer, 0])
            arrays["tokens"].append(ids[:-1])
            arrays["targets"].append(np.where(np.arange(1, len(ids)) < len(prompt), IGNORED, ids[1:]))
            arrays["part"].append(np.full(len(ids) - 1, part))
        joined = {name: np.concatenate(values) for name, values in arrays.items()}
        examples.append(Example(arrays=joined, weight=1.0))
    return example_corpus(folder, examples, packing=packing, digest=f"pairs-{packing}")


def text_pair_corpus(folder: Path, *, packing: str = "examples", num_pairs: int = 90) -> CorpusInfo:
    """Texts that belong together: each token of the second one follows from one of the first; some have a third."""
    rng = np.random.default_rng(2)
    examples = []
    for number in range(num_pairs):
        query = rng.integers(1, VOCAB, size=int(rng.integers(1, 4)))
        texts = [query, (query * 5 + 3) % VOCAB]
        if number % 3 == 0:
            texts.append(rng.integers(1, VOCAB, size=2))
        tokens = np.concatenate(texts)
        part = np.repeat(np.arange(1, len(texts) + 1), [len(text) for text in texts])
        examples.append(Example(arrays={"tokens": tokens, "targets": tokens.copy(), "part": part}, weight=1.0))
    return example_corpus(folder, examples, packing=packing, digest=f"texts-{packing}")


def example_corpus(
    folder: Path,
    examples: Sequence[Example],
    *,
    packing: str,
    digest: str,
    seq_len: int = SEQ_LEN,
    vocab_size: int = VOCAB,
) -> CorpusInfo:
    """Prepare examples; a tenth is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    num_examples = len(examples)
    writer = ExampleWriter(folder, seq_len=seq_len, vocab_size=vocab_size)
    for number, example in enumerate(examples):
        writer.add(example, key=number, location="")
    tables = writer.close()
    splits = {}
    for name, chosen in (
        ("train", np.arange(num_examples // 10, num_examples)),
        ("held_out", np.arange(num_examples // 10)),
    ):
        (folder / name).mkdir()
        rows = [chosen[row] for row in pack_rows(writer.lengths[chosen], seq_len=seq_len, seed=1)]
        rows = rows if packing == "examples" else [chosen[i : i + 1] for i in range(len(chosen))]
        tables += write_rows(folder, name=name, rows=rows, examples=writer)
        splits[name] = SplitSizes(
            num_rows=len(rows),
            num_examples=len(chosen),
            num_tokens=int(writer.lengths[chosen].sum()),
            num_targets=int(writer.num_targets[chosen].sum()),
        )
    index = CacheIndex(
        digest=digest,
        dtype="<u2",
        vocab_size=vocab_size,
        eot_id=0,
        num_documents=num_examples,
        num_text_bytes=0,
        unigram_perplexity=None,
        train=(),
        held_out=(),
        tokenizer=(),
        tables=tuple(tables),
        examples=ExampleLayout(
            seq_len=seq_len, packing=packing, columns=writer.columns, notes={}, foreign_target=None, **splits
        ),
    )
    write_index(folder, index=index)
    return CorpusInfo(
        folder=str(folder),
        digest=index.digest,
        vocab_size=vocab_size,
        eot_id=0,
        seq_len=seq_len,
        num_documents=num_examples,
        num_text_bytes=0,
        num_train_tokens=splits["train"].num_targets,
        num_held_out_tokens=splits["held_out"].num_targets,
        num_train_sequences=splits["train"].num_rows,
        num_held_out_sequences=splits["held_out"].num_rows,
        unigram_perplexity=float(vocab_size),
        packing=packing,
    )
