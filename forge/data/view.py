"""What training will see of a prepared corpus, with examples as text.

Only the index and the examples that are shown are read, so the time does not grow with the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from forge.data.cache_index import read_index
from forge.data.example_store import ExampleRows
from forge.data.order import SampleOrder
from forge.data.prepare import open_rows
from forge.data.rows import IGNORED, Arrays, RowStore
from forge.data.spans import SpanReader
from forge.errors import ArgumentError
from forge.plan.data_view import DataView, ShownExample
from forge.plan.inputs import CorpusInfo

SHOWN_IN_PLAN = 3
CHARS_IN_PLAN = 400
"""Most characters of a span in a plan."""
MIN_CHARS = 20
MAX_VALUES = {"count": 1000, "max_chars": 1_000_000}
"""Of the fields of `Selection`."""
SPLITS = ("train", "held_out")
_SHOWN_VALUES = 8
_ALWAYS_SHOWN = {"tokens", "targets", "part"}
_SHOWN_AS_TARGET = {"values", "label_bits"}
"""Of labelled texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which examples are shown."""

    count: int = SHOWN_IN_PLAN
    """This many, spread evenly by a seeded order."""
    index: int | None = None
    """From this one on, in the order of the records."""
    split: str | None = None
    """`train` or `held_out`; None: `train`, or for an index whichever it is in."""
    max_chars: int = CHARS_IN_PLAN
    part: str | None = None
    """Of a mixture, the part; None: all of them."""

    def __post_init__(self) -> None:
        """Raises: ArgumentError for another split, or numbers out of range."""
        if self.split not in (None, *SPLITS):
            raise ArgumentError(f"{self.split!r} is no split; give one of {', '.join(SPLITS)}")
        for name, value, least in (("count", self.count, 1), ("max_chars", self.max_chars, MIN_CHARS)):
            if not least <= value <= MAX_VALUES[name]:
                raise ArgumentError(f"{name} must be in {least}..{MAX_VALUES[name]:,}, it is {value:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveView:
    """How an objective sees the stored examples."""

    predicts_tokens: bool | None
    """Whether targets are token ids; None if that is not known (an objective of the user's own)."""
    part_names: Mapping[int, str] = field(default_factory=dict)
    """What the values of the array `part` are called."""
    show: Callable[[Arrays, int], Arrays] | None = None
    """Gives the arrays of an example, and its number, as a step sees them; None: as they are stored."""


def view_corpus(
    facts: CorpusInfo,
    *,
    objective: ObjectiveView,
    seed: int,
    selection: Selection | None = None,
    num_sampled_records: int | None = None,
    passes: float | None = None,
) -> DataView:
    """Describe a prepared corpus.

    Args:
        seed: of the choice of examples.
        selection: the examples that are shown; by default three.
        objective: how it sees the examples.
        num_sampled_records: if the corpus is a sample.
        passes: over the training sequences, by the whole run.

    Raises: DataError if the cache cannot be read; ArgumentError for an index that does not exist.
    """
    index = read_index(Path(facts.folder))
    layout = index.examples
    num_rows = facts.num_train_sequences
    num_tokens = num_rows * facts.seq_len if layout is None else layout.train.num_tokens
    num_targets = num_tokens if layout is None else layout.train.num_targets
    examples = _shown(facts, seed=seed, objective=objective, selection=selection or Selection())
    if objective.show is not None:
        share = sum(one.num_targets for one in examples) / max(1, sum(one.num_tokens for one in examples))
        num_targets = round(share * num_tokens)
    return DataView(
        num_sampled_records=num_sampled_records,
        num_examples=num_rows if layout is None else layout.train.num_examples,
        num_sequences=num_rows,
        num_tokens=num_tokens,
        num_targets=num_targets,
        is_estimate=objective.show is not None,
        has_labels=facts.labels is not None,
        padding=facts.padding,
        passes=passes,
        lengths=index.lengths,
        notes=facts.notes,
        noted_records=facts.noted_records,
        num_skipped_records=facts.num_skipped_records,
        examples=examples,
    )


def _shown(
    facts: CorpusInfo, *, seed: int, objective: ObjectiveView, selection: Selection
) -> tuple[ShownExample, ...]:
    labels = facts.labels
    content = (Path(facts.folder) / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    special = {token["id"] for token in json.loads(content)["added_tokens"] if token["special"]}
    reader = SpanReader(
        tokenizer=Tokenizer.from_str(content),
        special_ids=frozenset({facts.eot_id, *special}),
        predicts_tokens=objective.predicts_tokens,
        max_chars=selection.max_chars,
        part_names=objective.part_names,
        label_names=None if labels is None else labels.names,
    )
    train, held_out = open_rows(facts)
    sides = dict(zip(SPLITS, (train, held_out), strict=True))
    if selection.index is None:
        split = selection.split or "train"
        chosen = [(split, number) for number in _spread(sides[split], count=selection.count, seed=seed)]
    else:
        chosen = _following(sides, first=selection.index, count=selection.count, split=selection.split)
    return tuple(
        _shown_example(sides[split], number=number, split=split, reader=reader, show=objective.show)
        for split, number in chosen
    )


def _spread(rows: RowStore, *, count: int, seed: int) -> list[int]:
    """Numbers of examples in a seeded order, without any twice."""
    total = rows.num_examples if isinstance(rows, ExampleRows) else rows.num_rows
    if not total:
        return []
    order = SampleOrder(num_samples=total, seed=seed)
    positions = order.samples(np.arange(min(count, total), dtype=np.int64))
    numbers = rows.example_numbers(positions) if isinstance(rows, ExampleRows) else positions
    return [int(number) for number in numbers]


def _following(sides: dict[str, RowStore], *, first: int, count: int, split: str | None) -> list[tuple[str, int]]:
    """The split and number of up to `count` examples from `first` on.

    Raises: ArgumentError if there is no such example, or it is in the other split.
    """
    train = sides["train"]
    if not isinstance(train, ExampleRows):
        split = split or "train"
        total = sides[split].num_rows
        _require_index(first, total=total, of=f"{split} sequences")
        return [(split, number) for number in range(first, min(first + count, total))]
    _require_index(first, total=train.num_stored, of="examples")
    stop = min(first + count, train.num_stored)
    in_train = set(train.numbers_between(first, stop))
    found = [("train" if number in in_train else "held_out", number) for number in range(first, stop)]
    if split is not None and found[0][0] != split:
        raise ArgumentError(f"example {first} is in the split {found[0][0]}, not in {split}")
    return [(where, number) for where, number in found if split in (None, where)]


def _require_index(index: int, *, total: int, of: str) -> None:
    if not 0 <= index < total:
        known = f"they are numbered from 0 to {total - 1:,}" if total else "there are none"
        raise ArgumentError(f"there is no number {index:,} among the {of}; {known}")


def _shown_example(
    rows: RowStore, *, number: int, split: str, reader: SpanReader, show: Callable[[Arrays, int], Arrays] | None
) -> ShownExample:
    arrays: Arrays
    if isinstance(rows, ExampleRows):
        arrays = rows.example(number)
    else:
        arrays = {name: values[0] for name, values in rows.read(np.array([number], dtype=np.int64)).items()}
    arrays = arrays if show is None else show(arrays, number)
    hidden = _ALWAYS_SHOWN | (_SHOWN_AS_TARGET if reader.label_names is not None else set())
    return ShownExample(
        index=number,
        split=split,
        num_tokens=len(arrays["tokens"]),
        num_targets=int((arrays["targets"] != IGNORED).sum()),
        spans=reader.spans(arrays),
        arrays={name: _beginning(values) for name, values in arrays.items() if name not in hidden},
    )


def _beginning(values: NDArray[Any]) -> str:
    """The first values of an array, or its only one."""
    flat = values.reshape(-1)
    if len(flat) and (flat == flat[0]).all():
        return f"{flat[0]:g} at every position"
    return _listed(flat[:_SHOWN_VALUES].tolist()) + (", …" if len(flat) > _SHOWN_VALUES else "")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
