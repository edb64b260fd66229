"""Records from the Python standard library of this interpreter: real text on every machine, without a download."""

from __future__ import annotations

import logging
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from forge.data.sources.base import Record
from forge.data.sources.files import fingerprint_of, text_records
from forge.data.sources.listing import SourceFile
from forge.data.sources.pieces import blocks_of
from forge.errors import DataError

_STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "turtledemo", "tkinter"}
    | {"lib2to3", "distutils", "ensurepip"}
)
"""Third-party code, and what some distributions and releases of Python lack (Debian moves the test suites,
idlelib and tkinter to packages of their own; 3.12 dropped distutils, 3.13 lib2to3). What remains, 10.0 MB
in 513 files of CPython 3.11.7, is nearly the same text on every machine with the same Python."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StdlibSource:
    """The Python sources of the standard library, one record per file; a file that does not decode is logged."""

    text_key: str = "text"

    def files(self) -> list[SourceFile]:
        """Every source file, sorted by name. Raises: DataError if there are none."""
        root = sysconfig.get_paths()["stdlib"]
        names: list[str] = []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]
            prefix = Path(folder).relative_to(root)
            # _sysconfigdata_* and sitecustomize differ between builds and packages of Python.
            names += [
                (prefix / name).as_posix()
                for name in files
                if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize"))
            ]
        if not names:
            raise DataError(f"data.source: python-stdlib: no Python sources below {root}; use data.files instead")
        fs = LocalFileSystem()
        return [
            SourceFile(fs=fs, path=f"{root}/{name}", name=name, size_bytes=Path(root, name).stat().st_size)
            for name in sorted(names)
        ]

    def fingerprint(self) -> str:
        return fingerprint_of(self.files())

    def parts(self) -> Sequence[Iterable[Record]]:
        return [_LazyModule(file=file, text_key=self.text_key) for file in self.files()]

    def records(self) -> Iterator[Record]:
        return chain.from_iterable(self.parts())


@dataclass(frozen=True, slots=True, kw_only=True)
class _LazyModule:
    file: SourceFile
    text_key: str

    def __iter__(self) -> Iterator[Record]:
        try:
            with tokenize.open(self.file.path) as stream:  # honours the coding line
                text = stream.read()
        except OSError as error:
            raise DataError(f"{self.file.path} cannot be read: {error}") from None
        except (SyntaxError, UnicodeDecodeError) as error:
            _log.info("skipped %s, which does not decode: %s", self.file.path, error)
            return
        yield from text_records(self.file, blocks_of(text), text_key=self.text_key)
