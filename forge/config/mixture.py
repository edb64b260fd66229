"""`data.mixture`: corpora that a run reads together, each with its share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, field_validator, model_validator

from forge.config.class_names import SourceName
from forge.config.section import FieldError, Fraction, Number, Section, Strings, raise_errors

FileType = Literal["auto", "text", "json", "csv", "parquet"]
MAX_PARTS = 1024
"""Most parts of a mixture; each opens its own files in every worker."""

_NAME = "^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?$"
_MAX_WEIGHT = 1e9
_MAX_PASSES = 1e6


class MixturePart(Section):
    """One corpus of a mixture. What is not listed here is the same for all parts: give it in `data`."""

    name: str = Field(json_schema_extra={"pattern": _NAME})
    """Lower-case letters, digits, dashes and underscores, at most 40. Its held-out loss is `eval/loss/NAME`."""

    weight: Fraction | None = Field(None, gt=0, le=_MAX_WEIGHT)
    """Share of the sequences, relative to the weights of the other parts: `0.7` and `0.3` mean the same as `7` and
    `3`. It is kept exactly in every block of 65,536 sequences, rounded to whole sequences."""

    passes: Number | None = Field(None, gt=0, le=_MAX_PASSES)
    """Instead of `weight`: passes over this part in each of `training.epochs`; 1 for all parts if none has a
    `weight` or `passes`."""

    source: SourceName | None = None
    """As `data.source`. Give one of `source`, `files` and `dataset`."""

    files: Strings | None = None
    """As `data.files`."""

    dataset: str | None = Field(None, min_length=1)
    """As `data.dataset`."""

    subset: str | None = Field(None, min_length=1)
    """As `data.subset`."""

    split: str = Field("train", min_length=1)
    """As `data.split`."""

    revision: str | None = Field(None, pattern=r"^[\w./-]{1,200}$")
    """As `data.revision`."""

    file_type: FileType = "auto"
    """As `data.file_type`."""

    text_key: str | None = Field(None, min_length=1)
    """As `data.text_key`, which it is if it is left out."""

    @field_validator("name")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        if not re.fullmatch(_NAME[1:-1], value):
            raise ValueError("must be 1 to 40 lower-case letters, digits, dashes and underscores, such as 'code'")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> MixturePart:
        errors = list(origin_problems(self))
        if self.weight is not None and self.passes is not None:
            errors.append(FieldError("passes", "is instead of 'weight'; give one of them", depends_on=("weight",)))
        raise_errors(errors)
        if sum(origin is not None for origin in (self.source, self.files, self.dataset)) != 1:
            raise ValueError("give one of 'source', 'files' and 'dataset'")
        return self


def _read_parts(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError("must be a list of parts, each with a name: '- name: code'")
    return tuple(value) if isinstance(value, list) else value


MixtureParts = Annotated[tuple[MixturePart, ...], BeforeValidator(_read_parts)]


class Origin(Protocol):
    """The keys that say where records come from."""

    @property
    def source(self) -> str | None: ...
    @property
    def files(self) -> Sequence[str] | None: ...
    @property
    def dataset(self) -> str | None: ...
    @property
    def file_type(self) -> str: ...


def origin_problems(origin: Origin) -> Iterator[FieldError]:
    """Yield the keys of one origin that another one was given with."""
    if origin.files is not None and not (origin.files and all(origin.files)):
        yield FieldError("files", "must name at least one file or glob")
    if origin.file_type != "auto" and origin.source is not None:
        yield FieldError("file_type", "is only for 'files'")
    if origin.dataset is None:
        of_dataset = {"subset": None, "split": "train", "revision": None}
        given = [key for key, default in of_dataset.items() if getattr(origin, key) != default]
        yield from (FieldError(key, "is only for 'dataset'") for key in given)


def mixture_problems(parts: Sequence[MixturePart]) -> Iterator[FieldError]:
    """Yield what is wrong between the parts."""
    if len(parts) > MAX_PARTS:
        yield FieldError("mixture", f"has {len(parts):,} parts; at most {MAX_PARTS:,} are read")
    names = [part.name for part in parts]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield FieldError(f"mixture[{number}].name", f"is the name of mixture[{names.index(name)}] too")
    key = next((key for key in ("weight", "passes") if any(getattr(part, key) is not None for part in parts)), None)
    for number, part in enumerate(parts):
        if key is not None and getattr(part, key) is None:
            given = "has 'passes', but other parts have" if part.passes is not None else "lacks"
            yield FieldError(f"mixture[{number}]", f"{given} '{key}'; give it in every part or in none")
