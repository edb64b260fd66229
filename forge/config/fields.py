"""The tree of all keys of a job file or cluster file, derived from the types of its sections."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from forge.config.section import Section
from forge.config.yaml_reader import join_key

ANY_KEY = "KEY"
"""Represents the user-defined keys of a mapping whose values are sections."""

Loc = Sequence[str | int]
"""Location in a file as pydantic reports it: keys, and indices of lists."""


def known_sections(section: type[Section], *, key: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield every section with its dotted key, in the order of the file; first the whole file, with key ``."""
    yield key, section
    for name, field in section.model_fields.items():
        below = join_key(key, name) + (f".{ANY_KEY}" if _is_mapping(field.annotation) else "")
        for inner in _sections_in(field.annotation):
            yield from known_sections(inner, key=below)


@functools.cache
def known_keys(root: type[Section]) -> tuple[str, ...]:
    """Return every dotted key, except user-defined ones and those of the model config."""
    return tuple(join_key(key, name) for key, section in known_sections(root) for name in section.model_fields)


def section_at(loc: Loc, *, root: type[Section]) -> type[Section] | None:
    """Return the type of the section at `loc`; None if that key is not a section."""
    section, names = root, iter([name for name in loc if isinstance(name, str)])  # a list has sections of one type
    for name in names:
        field = section.model_fields.get(name)
        inner = next(_sections_in(field.annotation), None) if field else None
        if inner is None:
            return None
        if field is not None and _is_mapping(field.annotation) and next(names, None) is None:
            return None
        section = inner
    return section


def literal_values(loc: Loc, *, root: type[Section]) -> list[str | int]:
    """Return the allowed values of the key at `loc`; empty if it is not restricted to a list of values."""
    section = section_at(loc[:-1], root=root)
    field = section.model_fields.get(str(loc[-1])) if section else None
    if field is None:
        return []
    literals = [member for member in _members(field.annotation) if typing.get_origin(member) is Literal]
    return [value for literal in literals for value in typing.get_args(literal)]


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    return (member for member in _members(annotation) if isinstance(member, type) and issubclass(member, Section))


def _is_mapping(annotation: Any) -> bool:
    return any(typing.get_origin(member) is dict for member in (annotation, *typing.get_args(annotation)))


def _members(annotation: Any) -> tuple[Any, ...]:
    """`A | B` → `A`, `B`; `tuple[A, ...]` → `A`, `...`; any other annotation → itself."""
    if typing.get_origin(annotation) in (None, Literal):
        return (annotation,)
    return typing.get_args(annotation)
