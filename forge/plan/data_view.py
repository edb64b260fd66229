"""What a model will see of a corpus: numbers of the whole, and a few examples with what carries loss marked.

`forge.data.view` makes it from the prepared corpus, or from a sample of records where the corpus is not prepared.
These are plain values, kept in `plan.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SpanKind = Literal["text", "special", "omitted"]
"""`special`: tokens that end a text or structure it, as opposed to text that spells their names. `omitted`: a mark
for text that is left out of the view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths in tokens: of documents where they are concatenated, of examples elsewhere."""

    count: int
    mean: float
    shortest: int
    median: int
    p90: int
    p99: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Neighbouring tokens of an example that are alike."""

    text: str
    has_loss: bool
    """Whether the model is trained to predict these tokens or, with a `target`, that one in their place."""
    kind: SpanKind = "text"
    target: str = ""
    """What is predicted at these positions if it is not the text itself: a label, or the tokens behind a mask."""
    part: str | None = None
    """The name or number of the part, in formats whose examples have several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownExample:
    """One example as the model sees it, of bounded size."""

    index: int
    """Its number in the order of the records, from 0; of concatenated documents, the number of the sequence."""
    split: str
    """`train` or `held_out`."""
    num_tokens: int
    num_targets: int
    """Positions at which something is predicted."""
    spans: tuple[Span, ...]
    arrays: Mapping[str, str] = field(default_factory=dict)
    """The beginning of every further array."""
    of_part: str | None = None
    """The part of the mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataView:
    """What training sees of a corpus; the held-out side is counted elsewhere."""

    num_sampled_records: int | None
    """Records of the sample that all numbers refer to; None if they are of the whole corpus."""
    num_examples: int
    """Training examples; of concatenated documents, sequences."""
    num_sequences: int
    num_tokens: int
    """Positions of the training sequences that are not padding."""
    num_targets: int
    """Of these, the positions at which something is predicted."""
    is_estimate: bool = False
    """Whether `num_targets` is estimated by the examples shown, as the objective draws targets in every step."""
    has_labels: bool = False
    """Whether targets are labels or numbers, of which a text has one."""
    padding: float
    """Share of the positions of the training sequences that hold no token."""
    passes: float | None
    """How often the run sees every training sequence, on average; None for a sample."""
    lengths: Lengths | None
    """Of the training and the held-out side; None of a mixture, and if the cache does not record them."""
    notes: Mapping[str, int]
    """What was split, cut or dropped while the examples were made, by reason."""
    noted_records: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`FILE:LINE` of the first records of each of the `notes` of which these are known."""
    num_skipped_records: int
    """Records that cannot be used (`data.on_bad_record: skip`)."""
    examples: tuple[ShownExample, ...]
    parts: tuple[PartView, ...] = ()
    """Of a mixture; its own numbers are sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartView:
    """One part of a mixture."""

    name: str
    num_documents: int
    num_held_out_sequences: int
    asked: float | None
    """Share of the sequences that a run is to read, between 0 and 1; None if it follows from unknown sizes."""
    got: float | None
    """The same in whole sequences of a block."""
    view: DataView
    """Without examples."""
