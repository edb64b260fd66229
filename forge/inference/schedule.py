"""Which sequences take part in the next step of the engine.

Decoding sequences have the first rows, one each; prompts that are being computed have the next rows. Sequences join
and leave between steps. Prompts are computed in the order of their arrival, in pieces of at most `step_tokens` per
step, together with the next token of every decoding sequence. If the rows do not fit the cache any more, the newest
sequence gives its row up and is computed again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from forge.inference.packed_rows import ALIGN, PromptPiece, Rows, aligned
from forge.inference.prefixes import Prefixes
from forge.inference.running import RunningSequence

_MIN_LENGTH = 4 * ALIGN


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How much runs at once."""

    max_rows: int
    """Sequences that run at once."""
    cache_tokens: int
    """Rows times the length of the longest one."""
    step_tokens: int
    """Tokens of prompts that are computed in one step, unless more than as many sequences decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """The sequences of one step: those that decode, in the order of rows, and pieces of prompts."""

    decoding: tuple[RunningSequence, ...]
    prompts: tuple[tuple[RunningSequence, PromptPiece], ...]
    draft: tuple[int, ...] = ()
    """Guesses of the tokens after the newest one of the only sequence that decodes; computed with it."""


class Schedule:
    """Waiting and running sequences.

    Args:
        rows: resized and rearranged by this class alone.
    """

    def __init__(self, *, limits: BatchLimits, rows: Rows, prefixes: Prefixes) -> None:
        self._limits = limits
        self._rows = rows
        self._prefixes = prefixes
        self.waiting: deque[RunningSequence] = deque()
        self.decoding: list[RunningSequence] = []
        self.prompting: list[RunningSequence] = []
        self.num_preemptions = 0
        self._arrivals = 0

    def add(self, sequence: RunningSequence) -> None:
        """Append a new sequence to the queue."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def __iter__(self) -> Iterator[RunningSequence]:
        yield from (*self.decoding, *self.prompting, *self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prompting)

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are in rows."""
        return sum(one.num_computed for one in (*self.decoding, *self.prompting))

    def plan(self) -> PlannedStep | None:
        """Choose the next step; None if nothing runs or waits."""
        while (shape := self._shape(num_rows=self.num_running, longest=self._longest())) is None:
            self._preempt()
        self._rows.resize(num_rows=shape[0], length=shape[1])
        budget = max(self._limits.step_tokens - len(self.decoding), ALIGN)
        offset = len(self.decoding)
        prompts: list[tuple[RunningSequence, PromptPiece]] = []
        for sequence in self._prompts():
            row = len(self.decoding) + len(prompts)
            stop = min(sequence.num_prefill, sequence.num_computed + budget)
            if stop < sequence.num_prefill:
                stop = stop // ALIGN * ALIGN  # the borders of pieces do not depend on what else runs
            if stop <= sequence.num_computed:
                break
            piece = PromptPiece(row=row, start=sequence.num_computed, stop=stop, offset=offset)
            prompts.append((sequence, piece))
            offset += stop - piece.start
            budget -= stop - piece.start
            if budget < ALIGN:
                break
        if not self.decoding and not prompts:
            return None
        return PlannedStep(decoding=tuple(self.decoding), prompts=tuple(prompts))

    def computed(self, step: PlannedStep) -> list[RunningSequence]:
        """Record that a step was computed. Returns the sequences whose next token is due, in the order of rows."""
        for sequence in step.decoding:
            sequence.num_computed += 1
        for sequence, piece in step.prompts:
            sequence.num_computed = piece.stop
            if piece.stop == sequence.num_prefill:
                self.prompting.remove(sequence)
                self.decoding.append(sequence)
                prompt = sequence.tokens[: sequence.num_prompt]
                self._prefixes.save(self._rows, row=piece.row, tokens=prompt, adapter=sequence.adapter)
        return [one for one in self.decoding if one.is_complete]

    def remove(self, sequence: RunningSequence) -> None:
        """Take a sequence out, wherever it is, and close the gap that its row leaves."""
        if sequence in self.decoding:
            row = self.decoding.index(sequence)
            last = self.decoding.pop()
            if last is not sequence:
                self._rows.copy(source=len(self.decoding), to=row, length=last.num_computed)
                self.decoding[row] = last
            self._shift_prompts(len(self.decoding) + 1)
        elif sequence in self.prompting:
            row = len(self.decoding) + self.prompting.index(sequence)
            self.prompting.remove(sequence)
            self._shift_prompts(row + 1)
        else:
            self.waiting.remove(sequence)

    def _shift_prompts(self, first: int) -> None:
        """Move the rows of prompts from `first` on down by one."""
        for index, sequence in enumerate(self.prompting):
            row = len(self.decoding) + index
            if row + 1 >= first:
                self._rows.copy(source=row + 1, to=row, length=sequence.num_computed)

    def _prompts(self) -> Iterator[RunningSequence]:
        """Prompts that are being computed, then waiting ones, each of which gets a row as it is taken."""
        yield from tuple(self.prompting)
        while self.waiting and self.num_running < self._limits.max_rows:
            sequence = self.waiting[0]
            if sequence.leader is not None and sequence.leader in self.prompting:
                return  # its prompt is about to be known
            longest = max(self._longest(), sequence.num_prefill + 1)
            shape = self._shape(num_rows=self.num_running + 1, longest=longest)
            if shape is None:
                return
            self._rows.resize(num_rows=shape[0], length=shape[1])
            self.waiting.popleft()
            prompt = sequence.tokens[: sequence.num_prefill]
            known = self._prefixes.load(self._rows, row=self.num_running, tokens=prompt, adapter=sequence.adapter)
            sequence.num_computed = sequence.num_cached = known
            self.prompting.append(sequence)
            yield sequence

    def _longest(self) -> int:
        decoding = (one.num_computed + 1 for one in self.decoding)
        return max((*decoding, *(one.num_prefill + 1 for one in self.prompting)), default=0)

    def _shape(self, *, num_rows: int, longest: int) -> tuple[int, int] | None:
        """Rows and length to allocate: as now, else doubled, else just what is needed; None: too large."""
        held = (self._rows.num_rows, self._rows.length)
        if num_rows <= held[0] and longest <= held[1]:
            return held
        rows = min(max(held[0], 1 << (num_rows - 1).bit_length()), self._limits.max_rows)
        length = max(held[1], _MIN_LENGTH, 1 << (longest - 1).bit_length())
        for shape in ((rows, length), (num_rows, length), (num_rows, aligned(longest))):
            if shape[0] * shape[1] <= self._limits.cache_tokens:
                return shape
        return None

    def _preempt(self) -> None:
        newest = max((*self.decoding, *self.prompting), key=lambda one: one.arrival)
        self.remove(newest)
        newest.restart()
        self.waiting.appendleft(newest)
        self.num_preemptions += 1
