"""BLEU and chrF of a corpus, by sacrebleu, whose signature says how they were computed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from scipy import sparse

from forge.config.task_metrics import BleuOptions, ChrfOptions
from forge.evaluate.metrics.base import Floats, ScoredExample, dense, references_of, text_of
from forge.objective.registry import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusScore:
    """A metric of sacrebleu: its statistics of segments, and the score of their sums, as its own bootstrap uses."""

    name: str
    reference: BLEU | CHRF
    num_references: int
    """Of each example; -1 if their number varies."""

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {self.name: "max"}

    @property
    def of_examples(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def signature(self) -> str:
        self.reference.num_refs = self.num_references
        return f"{self.name}|{self.reference.get_signature()}"

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        if not examples:
            return dense([], width=1)
        # The references of sacrebleu are streams: the first of every example, the second of every example, ...
        streams: list[Sequence[Any]] = list(itertools.zip_longest(*map(references_of, examples)))
        predictions = [text_of(example.prediction) for example in examples]
        rows = self.reference._extract_corpus_statistics(predictions, streams)
        return dense(rows, width=len(rows[0]))

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        scores = [self.reference._compute_score_from_stats(row.tolist()).score for row in sums]
        return {self.name: np.array(scores, dtype=np.float64)}


def build_bleu(options: BleuOptions, *, num_references: int) -> CorpusScore:
    """BLEU-4."""
    reference = BLEU(lowercase=options.lowercase, tokenize=options.tokenize, smooth_method=options.smooth)
    return CorpusScore(name="bleu", reference=reference, num_references=num_references)


def build_chrf(options: ChrfOptions, *, num_references: int) -> CorpusScore:
    """chrF, or chrF++ with `word_order: 2`."""
    reference = CHRF(lowercase=options.lowercase, word_order=options.word_order)
    return CorpusScore(name="chrf", reference=reference, num_references=num_references)
