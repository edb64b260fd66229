"""The interface of an example format, which turns a record into examples.

An example has arrays of one length, and the number of loss terms that it contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from forge.config.classification import LabelKind
from forge.config.data import PairSpec
from forge.config.embedding import EmbeddingSpec
from forge.data.noted_records import NotedRecords
from forge.data.sources.base import Record
from forge.data.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What is learnt from, by itself: no other example of the row is visible to it.

    Shapes: arrays: each [n] or [n, d] with the same n; `tokens` and `targets` are int[n], targets[i] is what
    position i predicts, -100 where nothing is. Built-in objectives predict tokens, so their targets are token ids.
    """

    arrays: Mapping[str, NDArray[Any]]
    weight: float
    """Number of loss terms: what the objective's weights of these positions sum to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """`data.chat`, with the content of the template file."""

    turns: Literal["all", "last"] = "all"
    template: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSettings:
    """`data.preference`."""

    texts: Literal["auto", "chat", "plain"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSettings:
    """`data.labels`, with what was found in the records."""

    kind: LabelKind = "single"
    key: str = "label"
    words_key: str = "tokens"
    pair_key: str = "text_pair"
    names: tuple[str, ...] = ()
    """Of all labels, in the order of their numbers."""
    has_pairs: bool = False
    """Whether any record has a second text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatContext:
    """What a format is built with."""

    seq_len: int
    """The longest example that fits into a row."""
    text_key: str
    eot_id: int
    vocab_size: int
    encode: Callable[[str], NDArray[np.int64]]
    """Token ids of a text; never the end-of-text token."""
    tokenizer: TextTokenizer
    chat: ChatSettings = ChatSettings()
    preference: PreferenceSettings = PreferenceSettings()
    labels: LabelSettings = LabelSettings()
    pair: PairSpec = field(default_factory=PairSpec)
    embedding: EmbeddingSpec = field(default_factory=EmbeddingSpec)
    noted: NotedRecords = field(default_factory=NotedRecords)
    """`noted.add(reason, record)` counts what the format cut, split or left out, and has the plan list it."""


class ExampleFormat(Protocol):
    """Turns records into examples; built with a FormatContext, used in one process."""

    def examples(self, record: Record) -> Iterator[Example]:
        """The examples of one record, none if it has nothing to learn from. Raises: DataError naming the record."""

    def counts(self) -> Mapping[str, int]:
        """What was split, shortened or skipped so far, by reason: whole numbers, shown in the plan.

        Called once before the first record, and at the end. What went through `FormatContext.noted` is in its
        `counts`.
        """
        return {}
