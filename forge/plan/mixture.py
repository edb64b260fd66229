"""How many sequences of each part a mixture has: in every block of positions, and in an epoch. Pure.

The positions of a run are divided into blocks. Every block has the same number of sequences of each part, so the
proportion is exact at the end of each block, whatever the length of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from forge.config.data import DataSpec
from forge.errors import PlanError
from forge.plan.inputs import CorpusInfo

BLOCK = 1 << 16
"""Positions of a block: weights are kept to 1/65,536, and the table of a block takes 1 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartShare:
    """What a run reads of one part."""

    name: str
    corpus: CorpusInfo
    asked: float
    """Share of the sequences that the weights ask for, between 0 and 1."""
    got: float
    """The same, rounded to whole sequences of a block."""

    def passes(self, num_positions: int) -> float:
        """How often a run of so many sequences reads each sequence of the part, on average."""
        return self.got * num_positions / self.corpus.num_train_sequences


def block_counts(data: DataSpec, *, num_sequences: Sequence[int]) -> tuple[int, ...]:
    """Return how many positions of a block belong to each part, by the method of the largest remainder.

    Args:
        data: of the job.
        num_sequences: of the training side of each part.

    Raises: PlanError for a part that is so small a share that it gets none.
    """
    shares = _shares(data, num_sequences=num_sequences)
    total = sum(shares)
    is_exact = all(share.denominator == 1 for share in shares) and total <= BLOCK and not _has_weights(data)
    size = int(total) if is_exact else BLOCK
    exact = [share * size / total for share in shares]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (counts[number] - exact[number], number))
    for number in by_remainder[: size - sum(counts)]:
        counts[number] += 1
    for number, (count, part) in enumerate(zip(counts, data.mixture, strict=True)):
        if not count:
            key = "weight" if part.weight is not None else "passes"
            problem = f"gives part {part.name} none of {size:,} sequences ({float(exact[number]):.2g}); raise it"
            raise PlanError(problem, job_key=f"data.mixture[{number}].{key}")
    return tuple(counts)


def epoch_sequences(data: DataSpec, corpus: CorpusInfo) -> int:
    """Return the sequences of `training.epochs: 1`: those of all parts, each times its `passes`."""
    if not corpus.parts or _has_weights(data):
        return corpus.num_train_sequences
    num_sequences = [part.corpus.num_train_sequences for part in corpus.parts]
    return int(sum(_shares(data, num_sequences=num_sequences)))


def part_shares(data: DataSpec, corpus: CorpusInfo) -> tuple[PartShare, ...]:
    """Return what a run reads of each part; empty without a mixture. Raises: PlanError as `block_counts`."""
    if not corpus.parts:
        return ()
    num_sequences = [part.corpus.num_train_sequences for part in corpus.parts]
    shares = _shares(data, num_sequences=num_sequences)
    counts = block_counts(data, num_sequences=num_sequences)
    return tuple(
        PartShare(name=part.name, corpus=part.corpus, asked=float(share / sum(shares)), got=count / sum(counts))
        for part, share, count in zip(corpus.parts, shares, counts, strict=True)
    )


def as_read(data: DataSpec, corpus: CorpusInfo) -> CorpusInfo:
    """Return a mixture with the tokens and the padding of the sequences that a run reads."""
    shares = part_shares(data, corpus)
    if not shares:
        return corpus
    tokens = sum(one.got * one.corpus.num_train_tokens / one.corpus.num_train_sequences for one in shares)
    return replace(
        corpus,
        num_train_tokens=round(tokens * corpus.num_train_sequences),
        padding=sum(one.got * one.corpus.padding for one in shares),
    )


def _has_weights(data: DataSpec) -> bool:
    return any(part.weight is not None for part in data.mixture)


def _shares(data: DataSpec, *, num_sequences: Sequence[int]) -> list[Fraction]:
    """The weight of each part or, of passes, its sequences in an epoch, at least one."""
    if _has_weights(data):
        return [Fraction(part.weight or 0) for part in data.mixture]
    passes = [Fraction(1 if part.passes is None else part.passes) for part in data.mixture]
    return [Fraction(max(1, round(one * count))) for one, count in zip(passes, num_sequences, strict=True)]
