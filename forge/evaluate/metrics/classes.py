"""Metrics of labels: accuracy, precision, recall, F1 and Matthews' correlation, defined as in scikit-learn.

The label of an example is one, several, or one for each word; the counts of each class are the same for all three.
Where a class has no predictions or no examples, its precision or recall is 0; the averages are over the classes
that occur or are predicted. An example without an answer counts as predicted to be of no class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import sklearn
from scipy import sparse

from forge.config.classification import LabelKind
from forge.errors import DataError
from forge.evaluate.metrics.base import Answer, Floats, ScoredExample, dense, ratio
from forge.objective.registry import Direction
from forge.units import counted


def labels_of(examples: Iterable[ScoredExample], *, kind: LabelKind) -> tuple[str, ...]:
    """Every label that is predicted or expected, in the order of the alphabet."""
    found = {
        label
        for example in examples
        for answers in aligned(example, kind=kind)
        for label in answers
        if label is not None
    }
    return tuple(sorted(found))


def aligned(example: ScoredExample, *, kind: LabelKind) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The predicted and the expected labels of an example; of words, those that have a label.

    Raises: DataError if they are no labels, or not as many as the words.
    """
    predicted, expected = _labels(example.prediction), _labels(example.target)
    if kind == "multi":
        return tuple(dict.fromkeys(predicted)), tuple(dict.fromkeys(expected))
    if kind == "token":
        predicted = predicted or (None,) * len(expected)
        if len(predicted) != len(expected):
            raise DataError(f"{counted(len(predicted), 'tag')} predicted for {counted(len(expected), 'word')}")
        kept = [(a, b) for a, b in zip(predicted, expected, strict=True) if b is not None]
        return tuple(a for a, _ in kept), tuple(b for _, b in kept)
    if len(expected) != 1:
        raise DataError(f"an example has {len(expected)} labels, not one: {expected!r:.80}")
    return predicted or (None,), expected


def _labels(answer: Answer) -> tuple[str | None, ...]:
    if answer is None or isinstance(answer, str):
        return () if answer is None else (answer,)
    if not isinstance(answer, tuple):
        raise DataError(f"this metric compares labels, not the number {answer!r:.60}")
    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The share of right answers; of several labels that of the examples where all are right."""

    kind: LabelKind

    directions: ClassVar[Mapping[str, Direction]] = {"accuracy": "max"}
    of_examples: ClassVar[tuple[str, ...]] = ("accuracy",)

    @property
    def signature(self) -> str:
        return f"accuracy|labels:{self.kind}"

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return dense((self._counts(example) for example in examples), width=2)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        return {"accuracy": ratio(sums[:, 0], sums[:, 1])}

    def _counts(self, example: ScoredExample) -> tuple[int, int]:
        if self.kind == "single" and isinstance(example.target, tuple):  # of several texts any one is right
            return int(example.prediction is not None and example.prediction in example.target), 1
        predicted, expected = aligned(example, kind=self.kind)
        if self.kind == "multi":
            return int(set(predicted) == set(expected)), 1
        return sum(a == b for a, b in zip(predicted, expected, strict=True)), len(expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedAccuracy:
    """Accuracy of the choice with the largest log-likelihood per character, byte or token; the first of equal ones.

    Source: `acc_norm` of https://github.com/EleutherAI/lm-evaluation-harness, for characters.
    """

    by: str

    directions: ClassVar[Mapping[str, Direction]] = {"normalized_accuracy": "max"}
    of_examples: ClassVar[tuple[str, ...]] = ("normalized_accuracy",)

    @property
    def signature(self) -> str:
        return f"normalized_accuracy|by:{self.by}"

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return dense(((self._is_right(example), 1) for example in examples), width=2)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        return {"normalized_accuracy": ratio(sums[:, 0], sums[:, 1])}

    def _is_right(self, example: ScoredExample) -> bool:
        lengths = np.array(self._lengths(example), dtype=np.float64)
        scores = np.array(example.log_likelihoods, dtype=np.float64) / np.maximum(lengths, 1)
        if not len(scores) or np.isnan(scores).any():
            return False
        return example.choices[int(scores.argmax())] == example.target

    def _lengths(self, example: ScoredExample) -> Sequence[int]:
        if self.by == "tokens":
            return example.num_tokens
        if self.by == "bytes":
            return [len(choice.encode("utf-8", "surrogatepass")) for choice in example.choices]
        return [len(choice) for choice in example.choices]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByClass:
    """Precision, recall or F1, averaged over classes."""

    name: str
    kind: LabelKind
    labels: tuple[str, ...]
    average: tuple[str, ...]
    per_class: bool

    of_examples: ClassVar[tuple[str, ...]] = ()

    @property
    def directions(self) -> Mapping[str, Direction]:
        names = [f"{self.name}_{average}" for average in self.average]
        names += [f"{self.name}/{label}" for label in self.labels] if self.per_class else []
        return dict.fromkeys(names, "max")

    @property
    def signature(self) -> str:
        return f"{self.name}|labels:{self.kind}|classes:{len(self.labels)}|as:scikit-learn {sklearn.__version__}"

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        return class_counts(examples, kind=self.kind, labels=self.labels)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        hits, predicted, actual = np.split(sums[:, 1:], 3, axis=1)
        scores = self._scores(hits, predicted, actual)
        occurs = predicted + actual > 0
        together = (one.sum(axis=1) for one in (hits, predicted, actual))
        found = {
            "macro": ratio((scores * occurs).sum(axis=1), occurs.sum(axis=1)),
            "weighted": ratio((scores * actual).sum(axis=1), actual.sum(axis=1)),
            "micro": np.where(occurs.any(axis=1), self._scores(*together), np.nan),
        }
        values = {f"{self.name}_{average}": found[average] for average in self.average}
        if self.per_class:
            shown = np.where(occurs, scores, np.nan)
            values |= {f"{self.name}/{label}": shown[:, at] for at, label in enumerate(self.labels)}
        return values

    def _scores(self, hits: Floats, predicted: Floats, actual: Floats) -> Floats:
        """The score of each class."""
        if self.name == "precision":
            return ratio(hits, predicted, empty=0.0)
        if self.name == "recall":
            return ratio(hits, actual, empty=0.0)
        return ratio(2 * hits, predicted + actual, empty=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matthews:
    """Matthews' correlation coefficient; 0 where all predictions or all labels are of one class.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient" (2004), as in
    `sklearn.metrics.matthews_corrcoef`.
    """

    kind: LabelKind
    labels: tuple[str, ...]

    directions: ClassVar[Mapping[str, Direction]] = {"matthews": "max"}
    of_examples: ClassVar[tuple[str, ...]] = ()

    @property
    def signature(self) -> str:
        return f"matthews|labels:{self.kind}|classes:{len(self.labels)}|as:scikit-learn {sklearn.__version__}"

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        if self.kind == "multi":
            raise DataError("matthews is not defined for examples with several labels")
        return class_counts(examples, kind=self.kind, labels=self.labels)

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        hits, predicted, actual = np.split(sums[:, 1:], 3, axis=1)
        total = sums[:, 0]
        # Examples without an answer are a class of their own, which never occurs.
        unanswered = total - predicted.sum(axis=1)
        covariance = hits.sum(axis=1) * total - (predicted * actual).sum(axis=1)
        of_predicted = total**2 - (predicted**2).sum(axis=1) - unanswered**2
        of_actual = total**2 - (actual**2).sum(axis=1)
        found = ratio(covariance, np.sqrt(of_predicted * of_actual), empty=0.0)
        return {"matthews": np.where(total > 0, found, np.nan)}


def class_counts(examples: Sequence[ScoredExample], *, kind: LabelKind, labels: Sequence[str]) -> sparse.csr_array:
    """How many labels an example has, and how often each class is predicted rightly, is predicted, and occurs.

    Shapes: float64[N, 1 + 3K]; sparse, for any number of classes.
    """
    number = {label: at for at, label in enumerate(labels)}
    entries: list[tuple[int, int, int]] = []
    for row, example in enumerate(examples):
        predicted, expected = aligned(example, kind=kind)
        if kind == "multi":
            hits, total = sorted(set(predicted) & set(expected), key=str), 1
        else:
            hits, total = [a for a, b in zip(predicted, expected, strict=True) if a == b], len(expected)
        entries.append((row, 0, total))
        for block, found in enumerate((hits, predicted, expected)):
            entries += [(row, 1 + block * len(labels) + number[label], 1) for label in found if label is not None]
    table = np.array(entries, dtype=np.int64).reshape(-1, 3)
    shape = len(examples), 1 + 3 * len(labels)
    counts = table[:, 2].astype(np.float64)
    return sparse.coo_array((counts, (table[:, 0], table[:, 1])), shape=shape).tocsr()
