"""`data.labels:` and `training.classification:` what is said about a text."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from forge.config.section import FieldError, Section

LabelKind = Literal["single", "multi", "token", "regression"]

MAX_LABELS = 10_000
"""Most outputs of a classifier."""


def _label_names(value: Any) -> Any:
    """Names as they are written in JSON, so that 0 and true may be labels."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(json.dumps(one) if isinstance(one, bool | int) else one for one in value)


LabelNames = Annotated[
    tuple[str, ...],
    BeforeValidator(_label_names),
    WithJsonSchema({"type": "array", "items": {"type": ["string", "integer", "boolean"]}}),
]


class LabelsSpec(Section):
    """The labels of the records; only with `format: labelled`."""

    kind: LabelKind | None = None
    """What the label of a record is; that of `training.classification.kind` if it is left out. `single`: one label.
    `multi`: a list of labels, which may be empty. `token`: a list with a label, or null, for each word.
    `regression`: a number."""

    label_key: str | None = Field(None, min_length=1)
    """The field with the label; by default `label`, for `multi` `labels`, for `token` `tags`."""

    words_key: str = Field("tokens", min_length=1)
    """The field with the list of words, for `token`; where a record lacks it, the words are those of the text
    between blanks."""

    pair_key: str = Field("text_pair", min_length=1)
    """The field with a second text, which the tokenizer's own template joins to the first."""

    names: LabelNames | None = None
    """The names of the labels, in the order of the model's outputs. If they are left out, they are those of the
    records, in the order of the alphabet, or of their size if all are whole numbers; at most 1,000."""

    @property
    def key(self) -> str:
        """`label_key`, or its default."""
        return self.label_key or {"multi": "labels", "token": "tags"}.get(str(self.kind), "label")

    @model_validator(mode="after")
    def _fit(self) -> LabelsSpec:
        if self.names is None:
            return self
        if self.kind == "regression":
            raise FieldError("names", "is not for numbers, which have no names", depends_on=("kind",))
        twice = next((name for number, name in enumerate(self.names) if name in self.names[:number]), None)
        if twice is not None:
            raise FieldError("names", f"has {twice!r} twice")
        if not all(self.names) or not 2 - (self.kind == "multi") <= len(self.names) <= MAX_LABELS:
            raise FieldError("names", f"must list 2 to {MAX_LABELS:,} names, none of them empty")
        return self


def _class_weights(value: Any) -> Any:
    # A union type would report one error per member.
    if value in ("none", "balanced"):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be none, balanced, or a list with a number for each label")
    for one in value:
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 < one < math.inf:
            raise ValueError(f"must have numbers above 0, not {one!r:.40}")
    return tuple(float(one) for one in value)


ClassWeights = Annotated[
    Literal["none", "balanced"] | tuple[float, ...],
    BeforeValidator(_class_weights),
    WithJsonSchema(
        {"anyOf": [{"enum": ["none", "balanced"]}, {"type": "array", "items": {"type": "number"}, "minItems": 1}]}
    ),
]


class ClassificationSpec(Section):
    """What is said about a text; only with `objective: classification`."""

    kind: LabelKind = "single"
    """`single`: one label of several, by cross entropy. `multi`: any number of labels, each by binary cross
    entropy. `token`: one label for each word, at its first token. `regression`: a number, by the squared error."""

    class_weights: ClassWeights = "none"
    """Weights of the labels in the loss, for `single` and `token` as in torch's `CrossEntropyLoss`, for `multi` as
    its `pos_weight`. `balanced`: the number of examples by that of the label, so that all labels count the same. A
    list: one for each label, in the order of the names."""

    @model_validator(mode="after")
    def _has_classes(self) -> ClassificationSpec:
        if self.kind == "regression" and self.class_weights != "none":
            raise FieldError("class_weights", "is not for kind: regression, which has no classes")
        return self
