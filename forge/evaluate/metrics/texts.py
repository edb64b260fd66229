"""Metrics of written answers besides BLEU and chrF: ROUGE, exact match and token F1, word and character error rate.

The scores are those of rouge-score, of the script of SQuAD and of jiwer. Alignments are computed by rapidfuzz,
whose memory grows with the length of a text and not with the product of two, so a model that repeats itself for
thousands of words costs little.
"""

from __future__ import annotations

import itertools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import ClassVar

import jiwer
import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein
from scipy import sparse

from forge.config.task_metrics import RougeOptions, TextMatchOptions, WordErrorOptions
from forge.evaluate.metrics.base import Floats, ScoredExample, dense, ratio, references_of, text_of
from forge.objective.registry import Direction

Words = Callable[[str], Sequence[str]]

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")
_LATIN = re.compile(r"[a-z0-9]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanOfExamples:
    """The mean of scores that every example has: of each, the best of its references."""

    signature: str
    names: tuple[str, ...]
    score: Callable[[str, str], Sequence[float]]
    """Of a prediction and a reference, one score for each name."""

    @property
    def directions(self) -> Mapping[str, Direction]:
        return dict.fromkeys(self.names, "max")

    @property
    def of_examples(self) -> tuple[str, ...]:
        return self.names

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return dense(map(self._row, examples), width=len(self.names) + 1)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        return {name: ratio(sums[:, at], sums[:, -1]) for at, name in enumerate(self.names)}

    def _row(self, example: ScoredExample) -> list[float]:
        prediction = text_of(example.prediction)
        scores = [self.score(prediction, reference) for reference in references_of(example)]
        return [*map(max, zip(*scores, strict=True)), 1.0]


def build_rouge(options: RougeOptions) -> MeanOfExamples:
    """ROUGE-1, ROUGE-2 and ROUGE-L."""
    words = unicode_words if options.tokenize == "words" else _latin_words(stem=options.stem)

    def score(prediction: str, reference: str) -> tuple[float, float, float]:
        found, expected = words(prediction), words(reference)
        common = LCSseq.similarity(found, expected)
        return (
            _overlap_f1(Counter(found), Counter(expected)),
            _overlap_f1(Counter(itertools.pairwise(found)), Counter(itertools.pairwise(expected))),
            _f1(common, len(found), len(expected)),
        )

    stem = "yes" if options.stem else "no"
    signature = f"rouge|tok:{options.tokenize}|stem:{stem}|refs:best"
    return MeanOfExamples(signature=signature, names=("rouge1", "rouge2", "rougeL"), score=score)


def build_exact_match(options: TextMatchOptions) -> MeanOfExamples:
    """The share of answers that are equal to a reference."""
    normal = _normal_of(options)
    return MeanOfExamples(
        signature=f"exact_match|normalize:{options.normalize}",
        names=("exact_match",),
        score=lambda prediction, reference: (float(normal(prediction) == normal(reference)),),
    )


def build_token_f1(options: TextMatchOptions) -> MeanOfExamples:
    """The F1 score of the words of answer and reference.

    Source: https://rajpurkar.github.io/SQuAD-explorer, evaluation script of SQuAD 2.0: where one of the two has no
    words, the score is 1 if the other has none either.
    """
    normal = _normal_of(options)

    def score(prediction: str, reference: str) -> tuple[float]:
        found, expected = normal(prediction).split(), normal(reference).split()
        if not found or not expected:
            return (float(found == expected),)
        return (_overlap_f1(Counter(found), Counter(expected)),)

    return MeanOfExamples(signature=f"token_f1|normalize:{options.normalize}", names=("token_f1",), score=score)


def _normal_of(options: TextMatchOptions) -> Callable[[str], str]:
    return squad_normal if options.normalize == "squad" else str.strip


def squad_normal(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an and the, blanks made one."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _latin_words(*, stem: bool) -> Words:
    """The tokenizer of rouge-score: runs of a to z and 0 to 9, those of more than 3 characters by their stem."""
    if not stem:
        return lambda text: _LATIN.findall(text.lower())
    from nltk.stem.porter import PorterStemmer

    stemmed = PorterStemmer().stem
    return lambda text: [stemmed(word) if len(word) > 3 else word for word in _LATIN.findall(text.lower())]


def unicode_words(text: str) -> list[str]:
    """Runs of letters and digits of any script, in lower case; one word for each ideograph or kana."""
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def _overlap_f1(found: Counter[object], expected: Counter[object]) -> float:
    common = sum(min(count, expected[key]) for key, count in found.items() if key in expected)
    return _f1(common, found.total(), expected.total())


def _f1(common: int, num_found: int, num_expected: int) -> float:
    return 2 * common / (num_found + num_expected) if common else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRate:
    """Substituted, deleted and inserted words, or characters, by the number of those of the references.

    Of several references the one with the fewest errors counts. Above 1 if a model writes much more than expected.
    """

    name: str
    options: WordErrorOptions

    of_examples: ClassVar[tuple[str, ...]] = ("wer", "cer")

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {self.name: "min"}

    @property
    def signature(self) -> str:
        case = "lower" if self.options.lowercase else "mixed"
        return f"{self.name}|case:{case}|punctuation:{self.options.punctuation}|as:jiwer {version('jiwer')}"

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return dense(map(self._row, examples), width=2)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        # Without any word in the references, insertions are errors all the same.
        return {self.name: ratio(sums[:, 0], np.where((sums[:, 1] == 0) & (sums[:, 0] > 0), 1, sums[:, 1]))}

    def _row(self, example: ScoredExample) -> tuple[int, int]:
        found = self._units(text_of(example.prediction))
        expected = [self._units(reference) for reference in references_of(example)]
        return min((Levenshtein.distance(found, reference), len(reference)) for reference in expected)

    def _units(self, text: str) -> list[str]:
        text = text.lower() if self.options.lowercase else text
        if self.options.punctuation == "remove":
            text = "".join(one for one in text if not unicodedata.category(one).startswith("P"))
        transform = jiwer.wer_default if self.name == "wer" else jiwer.cer_default
        words: list[str] = transform([text])[0]
        return words
