"""The labels of records: read one by one, and found where the job does not name them.

A label is a string. A whole number and `true` or `false` are labels under the name that JSON gives them.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from forge.config.classification import LabelsSpec
from forge.data.formats.base import LabelSettings
from forge.data.pairs import is_blank
from forge.data.sources.base import Record
from forge.data.sources.files import json_name
from forge.errors import DataError

MAX_FOUND = 1000
"""Most labels that are taken from the records; a field with more is more likely to be something else."""
_MAX_LABEL_CHARS = 1000
"""Labels are in the plan, in every checkpoint and in the exported config."""
_MAX_SUGGESTED = 100
"""Unknown labels that are compared with all names."""
_MAX_NAMED = 8
_WHOLE = re.compile(r"-?\d{1,18}")


def label_settings(spec: LabelsSpec, records: Iterable[Record], *, is_sample: bool) -> LabelSettings:
    """Return the settings of a job, with the labels of its records if it names none; reads every record once.

    Args:
        is_sample: whether `records` are a part of the corpus, which may lack labels.

    Raises: DataError if the records have too many labels, or only one.
    """
    settings = LabelSettings(
        kind=spec.kind or "single",
        key=spec.key,
        words_key=spec.words_key,
        pair_key=spec.pair_key,
        names=spec.names or (),
    )
    found: dict[str, None] = {}
    has_pairs, must_find = False, spec.names is None and settings.kind != "regression"
    for record in records:
        has_pairs |= settings.kind != "token" and record.fields.get(settings.pair_key) is not None
        if must_find and not record.problem:
            found |= dict.fromkeys(_names_in(record, settings))
            _require_labels(found, record=record, settings=settings)
    if must_find and len(found) == 1 and settings.kind != "multi" and not is_sample:
        raise DataError(f"every record has the label {next(iter(found))!r:.80}: nothing can be told apart")
    return replace(settings, names=_ordered(found) if must_find else settings.names, has_pairs=has_pairs)


def names_of(record: Record, settings: LabelSettings) -> list[str | None]:
    """The labels of a record: one, or a list; of a word, None if it has no label.

    Raises: DataError naming the record.
    """
    value = value_of(record, key=settings.key, called="data.labels.label_key")
    if settings.kind == "single":
        if isinstance(value, list):
            problem = "is a list; several labels need training.classification.kind: multi, those of words token"
            raise DataError(f"{record.location}: {settings.key!r} {problem}")
        return [_name(value, record=record, key=settings.key)]
    if not isinstance(value, list):
        raise DataError(f"{record.location}: {settings.key!r} must be a list, it is {json_name(value)}")
    is_word = settings.kind == "token"
    return [
        None if is_word and one is None else _name(one, record=record, key=f"{settings.key}[{number}]")
        for number, one in enumerate(value)
    ]


def number_of(record: Record, settings: LabelSettings) -> float:
    """The number of a record. Raises: DataError naming the record if it is none, or not finite."""
    value = value_of(record, key=settings.key, called="data.labels.label_key")
    try:
        # CSV has no numbers, only their digits.
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        given = f"{value!r:.40}" if isinstance(value, str | int) else json_name(value)
        raise DataError(f"{record.location}: {settings.key!r} must be a number, it is {given}")
    if not abs(number) <= 3e38:  # nan too
        raise DataError(f"{record.location}: {settings.key!r} is {number:g}, which is no float32")
    return number


def value_of(record: Record, *, key: str, called: str) -> Any:
    """A field of a record. Raises: DataError naming the record and the nearest field if it lacks it."""
    if key not in record.fields:
        near = difflib.get_close_matches(key, list(record.fields)[:1000], n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        keys = ", ".join(f"{name!r:.40}" for name in list(record.fields)[:20]) or "none"
        raise DataError(f"{record.location}: no key {key!r} ({called}){guess}; the keys are: {keys}")
    return record.fields[key]


class LabelNumbers:
    """The numbers of labels, by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers: Mapping[str, int] = {name: number for number, name in enumerate(names)}
        self._num_suggested = 0

    def __getitem__(self, name: str) -> int:
        """Raises: ValueError with the nearest name if there is no such label."""
        if name in self._numbers:
            return self._numbers[name]
        self._num_suggested += 1
        near = difflib.get_close_matches(name[:200], self._numbers, n=1) if self._is_suggesting else []
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name!r:.80} is none of the labels{guess}: {listed(list(self._numbers))}")

    @property
    def _is_suggesting(self) -> bool:
        return self._num_suggested <= _MAX_SUGGESTED


def listed(names: Sequence[str]) -> str:
    """List at most eight names, and the number of the rest."""
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(f"{name:.40}" for name in names[:_MAX_NAMED]) + more


def _name(value: Any, *, record: Record, key: str) -> str:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # Parquet has whole numbers beside empty cells as floats
    if isinstance(value, bool | int):
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(f"{record.location}: {key!r} must be a label, it is {json_name(value)}")
    if is_blank(value):
        raise DataError(f"{record.location}: {key!r} is an empty label")
    if len(value) > _MAX_LABEL_CHARS:
        problem = f"has {len(value):,} characters; a label has at most {_MAX_LABEL_CHARS:,}"
        raise DataError(f"{record.location}: {key!r} {problem}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            problem = f"has half a surrogate pair at character {error.start}"
            raise DataError(f"{record.location}: {key!r} {problem}") from None
    return value


def _names_in(record: Record, settings: LabelSettings) -> Iterable[str]:
    """The labels of a record, none if it cannot be used, which is said when it is read again."""
    try:
        return [name for name in names_of(record, settings) if name is not None]
    except DataError:
        return ()


def _require_labels(found: Mapping[str, None], *, record: Record, settings: LabelSettings) -> None:
    if len(found) > MAX_FOUND:
        raise DataError(
            f"{record.location}: {settings.key!r} has more than {MAX_FOUND:,} different values so far, such as "
            f"{listed(list(found)[-3:])}; if they are labels, list them in data.labels.names, otherwise name "
            "the field of the labels in data.labels.label_key"
        )


def _ordered(found: Iterable[str]) -> tuple[str, ...]:
    names = list(found)
    if all(_WHOLE.fullmatch(name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))
