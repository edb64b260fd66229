"""Tags and a note that the user gives a run: `annotations.json` in its folder, so that they move with it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from forge.errors import ArgumentError, printable
from forge.foreign import from_record, parse_object, read_file
from forge.fs import write_atomic

ANNOTATIONS = "annotations.json"
_MAX_BYTES = 2**18
_MAX_TAGS = 50
_MAX_NOTE_CHARS = 10_000
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:=+-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What the user wrote about a run."""

    tags: tuple[str, ...] = ()
    note: str = ""


def read_annotations(folder: Path) -> Annotations:
    """Read the tags and the note of a run; none if the file does not exist or is not what forge writes."""
    try:
        found = from_record(Annotations, parse_object(read_file(folder / ANNOTATIONS, max_bytes=_MAX_BYTES)))
    except (OSError, ValueError):
        return Annotations()
    tags = tuple(tag for tag in found.tags if _TAG.fullmatch(tag))[:_MAX_TAGS]
    return Annotations(tags=tags, note=found.note[:_MAX_NOTE_CHARS])


def change_tags(folder: Path, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Annotations:
    """Add tags to a run and remove others.

    Raises: ArgumentError for a tag with other characters than letters, digits and `._:=+-`, for more than 50, for
    one to remove that the run does not have, and if the folder cannot be written.
    """
    add, remove, before = list(add), list(remove), read_annotations(folder)
    for tag in add:
        if not _TAG.fullmatch(tag):
            raise ArgumentError(
                f"'{printable(tag, limit=80)}' is not a tag: it has up to 64 letters, digits and ._:=+-, and "
                "begins with a letter or digit"
            )
    missing = [tag for tag in remove if tag not in before.tags]
    if missing:
        known = ", ".join(before.tags) or "none"
        raise ArgumentError(f"{folder.name} has no tag '{printable(missing[0], limit=80)}'; its tags: {known}")
    tags = tuple(tag for tag in dict.fromkeys([*before.tags, *add]) if tag not in remove)
    if len(tags) > _MAX_TAGS:
        raise ArgumentError(f"{folder.name} would have {len(tags)} tags; at most {_MAX_TAGS} are kept")
    return _write(folder, replace(before, tags=tags))


def set_note(folder: Path, note: str) -> Annotations:
    """Replace the note of a run. Raises: ArgumentError if it is too long or the folder cannot be written."""
    if len(note) > _MAX_NOTE_CHARS:
        raise ArgumentError(f"the note has {len(note):,} characters; at most {_MAX_NOTE_CHARS:,} are kept")
    return _write(folder, replace(read_annotations(folder), note=note))


def _write(folder: Path, annotations: Annotations) -> Annotations:
    try:
        write_atomic(folder / ANNOTATIONS, json.dumps(asdict(annotations), indent=1) + "\n")
    except OSError as error:
        raise ArgumentError(
            f"{folder} cannot be written: {error.strerror or os.strerror(error.errno or 0)}"
        ) from None
    return annotations
