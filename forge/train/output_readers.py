"""What stored outputs are computed by: the reference model of preference pairs, the teacher of a distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from forge.data.cache_index import Column, read_index
from forge.data.example_store import ExampleRows
from forge.data.further_columns import Values, record_type
from forge.data.prepare import open_rows
from forge.data.rows import IGNORED, Arrays, StreamRows
from forge.errors import DataError
from forge.objective.causal_lm import CausalLm
from forge.objective.distillation import TEACHER_LOG_PROBS, TEACHER_TOKENS, model_outputs
from forge.objective.divergence import top_log_probs
from forge.objective.pairs import REFERENCE_LOG_PROBS, PairRows
from forge.objective.preference import PairLogProbs
from forge.plan.inputs import CorpusInfo

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
BATCH_LOGITS = {"cpu": 2**28, "cuda": 2**32}
"""Of a teacher, whose logits are in memory for a whole batch."""
_CHUNK_LOGITS = 2**24
"""Of which distributions are in memory at once, in fp32."""


class OutputReader(Protocol):
    """Runs a model on rows of examples."""

    names: Sequence[str]
    """The arrays of examples that it needs."""
    columns: tuple[Column, ...]

    def values(self, rows: Arrays) -> Values:
        """Compute the values of rows. Shapes: rows: [m, T] → records [m, T]. Raises: DataError."""


class StoredExamples(Protocol):
    """Examples by number, both splits."""

    @property
    def num_stored(self) -> int: ...

    def example(self, number: int) -> Arrays:
        """Shapes: [n]."""


def columns_of(*, top_k: int | None, vocab_size: int) -> tuple[Column, ...]:
    """The columns of a teacher that stores `top_k` tokens, or of a reference model."""
    if top_k is None:
        return (Column(name=REFERENCE_LOG_PROBS, dtype="<f4", shape=()),)
    shape = (min(top_k, vocab_size),)
    return (
        Column(name=TEACHER_TOKENS, dtype="<i4", shape=shape),
        Column(name=TEACHER_LOG_PROBS, dtype="<f4", shape=shape),
    )


class PairReader:
    """The log-probability of every target under a reference model."""

    names: Sequence[str] = ("tokens", "targets", "part")

    def __init__(self, model: nn.Module, *, keeps_examples_apart: bool, has_linear_head: bool) -> None:
        self.columns = columns_of(top_k=None, vocab_size=0)
        self._model = model
        self._log_probs = PairLogProbs(keeps_examples_apart=keeps_examples_apart)
        if has_linear_head:
            self._log_probs.use_chunks(model)

    def values(self, rows: Arrays) -> Values:
        pairs = PairRows.of(rows)
        with torch.no_grad():
            found = self._log_probs.tokens(self._model, _on_device(self._log_probs.batch(pairs), self._model))
        found = _finite(found.float())
        records = np.zeros(rows["tokens"].shape, dtype=record_type(self.columns))
        records[REFERENCE_LOG_PROBS].reshape(-1)[pairs.where] = found.cpu().numpy()
        return records


class TeacherReader:
    """The tokens that a teacher finds most probable at every target, and their log-probabilities."""

    names: Sequence[str] = ("tokens", "targets")

    def __init__(self, model: nn.Module, *, top_k: int, temperature: float, vocab_size: int) -> None:
        self.columns = columns_of(top_k=top_k, vocab_size=vocab_size)
        self._model, self._vocab_size = model, vocab_size
        self._top_k, self._temperature = min(top_k, vocab_size), temperature
        self._rows = CausalLm()

    def values(self, rows: Arrays) -> Values:
        records = np.zeros(rows["tokens"].shape, dtype=record_type(self.columns))
        where = np.flatnonzero(rows["targets"].reshape(-1) != IGNORED)
        if not len(where):
            return records
        with torch.no_grad():
            logits = model_outputs(self._model, _on_device(self._rows.batch(rows), self._model)).logits
            logits = logits[torch.from_numpy(where).to(logits.device), : self._vocab_size]
            chunks = torch.split(_finite(logits), max(16, _CHUNK_LOGITS // self._vocab_size))
            found = [top_log_probs(one, temperature=self._temperature, top_k=self._top_k) for one in chunks]
        flat = records.reshape(-1)
        flat[TEACHER_LOG_PROBS][where] = torch.cat([top for top, _ in found]).cpu().numpy()
        flat[TEACHER_TOKENS][where] = torch.cat([tokens for _, tokens in found]).cpu().numpy()
        return records


class _Windows:
    """The windows of both token streams as examples."""

    def __init__(self, train: StreamRows, held_out: StreamRows) -> None:
        self._train, self._held_out = train, held_out

    @property
    def num_stored(self) -> int:
        return self._train.num_rows + self._held_out.num_rows

    def example(self, number: int) -> Arrays:
        count = self._train.num_rows
        rows, index = (self._train, number) if number < count else (self._held_out, number - count)
        return {name: values[0] for name, values in rows.read(np.array([index])).items()}


def stored_examples(corpus: CorpusInfo) -> StoredExamples:
    """Open the examples of a corpus, or the windows of its streams. Raises: DataError."""
    train, held_out = open_rows(corpus)
    if isinstance(train, StreamRows) and isinstance(held_out, StreamRows):
        return _Windows(train, held_out)
    return ExampleRows(folder=Path(corpus.folder), index=read_index(Path(corpus.folder)), split="train")


def values_of_examples(
    reader: OutputReader, examples: StoredExamples, *, first: int, seq_len: int, num_rows: int, is_packed: bool
) -> Iterator[Values]:
    """Yield the values of one example after the other.

    Args:
        first: the first example.
        num_rows: rows of a batch.
        is_packed: whether examples share rows.

    Raises: DataError for a value that is not finite.
    """
    for number, batch in batches(examples, first=first, seq_len=seq_len, num_rows=num_rows, is_packed=is_packed):
        try:
            records = reader.values(as_rows(batch, seq_len=seq_len, names=reader.names))
        except FloatingPointError:
            raise DataError(
                f"the model gives a target of the examples from {number} on a log-probability that is not finite; "
                "its weights cannot be used"
            ) from None
        for row, row_examples in zip(records, batch, strict=True):
            at = 0
            for example in row_examples:
                length = len(example["tokens"])
                yield row[at : at + length]
                at += length


def batches(
    examples: StoredExamples, *, first: int, seq_len: int, num_rows: int, is_packed: bool
) -> Iterator[tuple[int, list[list[Arrays]]]]:
    """Yield batches of up to `num_rows` rows of neighbouring examples, with the number of the first one."""
    begin = first
    batch: list[list[Arrays]] = [[]]
    room = seq_len
    for number in range(first, examples.num_stored):
        example = examples.example(number)
        length = len(example["tokens"])
        if length > room or (batch[-1] and not is_packed):
            if len(batch) == num_rows:
                yield begin, batch
                begin, batch = number, []
            batch.append([])
            room = seq_len
        batch[-1].append(example)
        room -= length
    if batch[-1]:
        yield begin, batch


def as_rows(batch: list[list[Arrays]], *, seq_len: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return rows as a store of examples gives them."""
    shape = len(batch), seq_len
    rows = {name: np.zeros(shape, dtype=np.int64) for name in (*names, "segment_ids", "position_ids")}
    rows["targets"][:] = IGNORED
    for i, examples in enumerate(batch):
        at = 0
        for number, example in enumerate(examples, start=1):
            stop = at + len(example["tokens"])
            for name in names:
                rows[name][i, at:stop] = example[name]
            rows["segment_ids"][i, at:stop] = number
            rows["position_ids"][i, at:stop] = np.arange(stop - at)
            at = stop
    return rows


def _on_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


def _finite(values: Tensor) -> Tensor:
    """Raises: FloatingPointError if one is not finite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError
    return values
