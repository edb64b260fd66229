"""Build the source of a job: a registered one by its name, or the files of `data.files`."""

from __future__ import annotations

from typing import cast

from forge.config.data import DataSpec
from forge.data.sources.base import Source
from forge.data.sources.files import FileSource
from forge.data.sources.registry import SOURCES
from forge.user_code import load_builtin_class


def build_source(spec: DataSpec, *, columns: tuple[str, ...] | None = None) -> Source:
    """Build the source of a job's `data:` section.

    Args:
        columns: fields that every record of a file must have; None reads all.
    """
    if spec.source is None:
        return FileSource(
            patterns=spec.files or (), file_type=spec.file_type, text_key=spec.text_key, columns=columns
        )
    return cast(Source, load_builtin_class(SOURCES[spec.source])(text_key=spec.text_key))
