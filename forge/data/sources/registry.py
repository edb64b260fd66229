"""The sources by their name in `data.source`; `data.files` uses the source `files`."""

from __future__ import annotations

from collections.abc import Callable

from forge.config.data import DataSpec
from forge.data.sources.base import Source
from forge.data.sources.files import FileSource
from forge.data.sources.stdlib import StdlibSource

Build = Callable[[DataSpec, tuple[str, ...] | None], Source]

SOURCES: dict[str, Build] = {
    "files": lambda spec, columns: FileSource(patterns=spec.files or (), text_key=spec.text_key, columns=columns),
    "python-stdlib": lambda spec, columns: StdlibSource(text_key=spec.text_key),
}


def build_source(spec: DataSpec, *, columns: tuple[str, ...] | None = None) -> Source:
    """Build the source of a job's `data:` section.

    Args:
        columns: fields that every record must have; None reads all.
    """
    return SOURCES[spec.source or "files"](spec, columns)
