"""The interface of a metric, and what it is computed of.

A metric is a function of sums over examples: every example gives a row of numbers (its sufficient statistics), and
the values of a corpus follow from the sum of its rows. So a resample of the examples, as the bootstrap takes them,
costs a sum and not another evaluation, for corpus-level metrics such as BLEU too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from forge.errors import DataError
from forge.objective.registry import Direction

Floats = NDArray[np.float64]

MAX_CHARS = 1 << 20
"""Longest text that a metric reads; the time of an alignment grows with the product of two lengths."""

Answer = str | float | tuple[str | None, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredExample:
    """The output of a model for one example, and what was expected; the kind of task decides what is set."""

    prediction: Answer = None
    """The text, label or number; several labels, or one for each word. None: the output holds no answer."""
    target: Answer = None
    """What is right; of `generate`, a tuple of texts of which any one is. None for a word is not scored."""
    choices: tuple[str, ...] = ()
    """`multiple-choice`: the texts to choose from. `log-likelihood`: the text that was scored, alone."""
    log_likelihoods: tuple[float, ...] = ()
    """Of each choice, in nats."""
    num_tokens: tuple[int, ...] = ()
    """Of each choice."""
    is_greedy: bool | None = None
    """`log-likelihood`: whether greedy decoding would write the text."""
    ranks: tuple[int, ...] = ()
    """`embed`: where the texts that belong to the query are found, from 1."""
    gains: tuple[float, ...] = ()
    """How relevant each of them is; 1 each if it is left out."""


class Metric(Protocol):
    """One metric, which may have several values, such as ROUGE-1, ROUGE-2 and ROUGE-L."""

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Every value that it gives, by name, and whether larger or smaller is better."""

    @property
    def signature(self) -> str:
        """How it is computed: package, version and options."""

    @property
    def of_examples(self) -> tuple[str, ...]:
        """The values that mean something of a single example."""

    def statistics(self, examples: Sequence[ScoredExample]) -> sparse.csr_array:
        """Shapes: float64[N, S]. Raises: DataError for an example that it cannot read."""

    def values(self, sums: Floats) -> Mapping[str, Floats]:
        """The values of each row of sums; NaN where one is not defined. Shapes: [R, S] → [R]."""


def dense(rows: Iterable[Sequence[float]], *, width: int) -> sparse.csr_array:
    """Statistics without structure. Shapes: [N][S] → [N, S]."""
    table = np.array(list(rows), dtype=np.float64).reshape(-1, width)
    return sparse.csr_array(table)


def ratio(numerator: Floats, denominator: Floats, *, empty: float = np.nan) -> Floats:
    """The quotients of two arrays, with `empty` where the denominator is 0."""
    found = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), empty)
    np.divide(numerator, denominator, out=found, where=denominator != 0)
    return found


def text_of(answer: Answer) -> str:
    """A prediction as text; empty if there is none.

    Raises: DataError for a text that is too long, or no text.
    """
    if answer is None:
        return ""
    if not isinstance(answer, str):
        raise DataError(f"this metric compares texts, not {type(answer).__name__} {answer!r:.60}")
    if len(answer) > MAX_CHARS:
        raise DataError(f"a text of {len(answer):,} characters is longer than metrics read ({MAX_CHARS:,})")
    return answer


def references_of(example: ScoredExample) -> tuple[str, ...]:
    """The texts of which any one is right.

    Raises: DataError if there is none.
    """
    target = example.target
    references = target if isinstance(target, tuple) else (target,)
    if not references or any(one is None for one in references):
        raise DataError("an example has no reference to compare the answer with")
    return tuple(text_of(one) for one in references)
