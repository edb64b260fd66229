"""Read JSON that may have been written elsewhere, with bounds on size, nesting, types and names.

A run folder, a checkpoint or a cache may have been copied from another machine, changed by hand, or made to do
harm. What such a file contains is data: it never chooses how much is read, which path is opened, or which type a
value has. Everything here raises ValueError with the reason, or OSError where a file cannot be read; nothing else.

    body = parse_object(read_file(path, max_bytes=16 * 2**20))
    ref = from_record(RemoteRef, body)
"""

from __future__ import annotations

import builtins
import collections.abc
import dataclasses
import errno
import fnmatch
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from forge.strict_json import STRICT

_Record = TypeVar("_Record")

MAX_DEPTH = 64
"""Levels of nesting; forge's own files have fewer than ten, and recursive readers handle several hundred."""
MAX_VALUES = 4_000_000
"""Values of one text; each takes at most about 230 bytes in memory, so this bounds the memory to 1 GB."""
MAX_INT = 2**63
"""Bound of integers: file offsets and sizes fit, and so does every conversion to float."""
MAX_ENTRIES = 1_000_000
"""Files of one folder and its subfolders."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER_BYTES = 100 * 2**20  # of a safetensors file
_MAX_NAME_BYTES = 255  # NAME_MAX of Linux
_SCALARS = (str, bool, int, float, dict, list, tuple, type(None))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def lfs_problem(path: Path) -> str | None:
    """Say that a file is only a git-lfs pointer to the real one; None if it is not. Raises: OSError."""
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    problem = "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
    return f"{path.name} {problem}" if is_pointer else None


def read_file(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole regular file, never through a link, a pipe or a device.

    Raises: OSError if it cannot be read, is a link or not a regular file; ValueError if it is too large.
    """
    with os.fdopen(open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
    if size > max_bytes or len(content) > max_bytes:
        raise ValueError(f"{path.name} has {max(size, len(content))} bytes; forge reads at most {max_bytes} of it")
    return content


def read_file_end(path: Path, *, max_bytes: int) -> bytes:
    """Read the last bytes of a regular file of any size. Raises: OSError as `read_file`."""
    with os.fdopen(open_file(path), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - max_bytes))
        return file.read(max_bytes)


def open_file(path: Path) -> int:
    """Open a regular file for reading, never through a link. Returns: a file descriptor.

    Raises: OSError if it cannot be opened, is a link or not a regular file.
    """
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait forever.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a link, which may lead outside the folder", str(path)) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return handle


def require_plain_tree(folder: Path, *, allowed_links: Sequence[str] = ()) -> None:
    """Check that a folder has regular files, folders and links that stay within it, and nothing else.

    A write through a link would change a file elsewhere; opening a pipe can wait forever. Folders are not entered
    through links.

    Args:
        allowed_links: patterns such as `logs/*.log` of links, relative to the folder, that may lead anywhere.

    Raises: OSError if the folder cannot be read; ValueError naming an entry that is something else, or if there
        are more than a million.
    """
    root, left = folder.resolve(), MAX_ENTRIES
    pending = [root]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                left -= 1
                if left < 0:
                    raise ValueError(f"{folder} has more than {MAX_ENTRIES} files")
                if entry.is_symlink():
                    path = Path(entry.path)
                    parts = path.relative_to(root).parts
                    if not any(_match(parts, pattern) for pattern in allowed_links) and not _resolves_into(
                        path, root
                    ):
                        raise ValueError(f"{path} is a link that leads out of the folder")
                elif entry.is_dir():
                    pending.append(Path(entry.path))
                elif not entry.is_file():
                    raise ValueError(f"{entry.path} is neither a file nor a folder")


def parse_json(
    text: bytes | str, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES, is_strict: bool = False
) -> Any:
    """Parse JSON of limited nesting and number of values.

    Args:
        is_strict: refuse what JSON does not have, or what parsers read differently: NaN, numbers beyond floats, and
            keys that occur twice in one object.

    Raises: ValueError with the reason.
    """
    if isinstance(text, bytes):
        text = text.decode()  # json.loads would guess the encoding, and let lone surrogates pass
    num_containers = text.count("[") + text.count("{")
    if num_containers + text.count(",") > max_values:
        raise ValueError(f"the JSON has more than {max_values} values")
    try:
        value = json.loads(text, **(STRICT if is_strict else {}))
    except RecursionError:
        raise ValueError(f"the JSON is nested deeper than {max_depth} levels") from None
    if num_containers > max_depth:
        _require_depth(value, max_depth)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
    return value


def parse_object(text: bytes | str, *, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Parse a JSON object. Raises: ValueError with the reason."""
    value = parse_json(text, max_values=max_values)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {_kind(value)}")
    return value


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the table of tensors of a safetensors file, and where their values begin.

    Raises: OSError; ValueError if the header is not valid. Source:
        https://huggingface.co/docs/safetensors/index#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if not size:
            raise ValueError("it is empty")
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"its header claims {length} bytes")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    header.pop("__metadata__", None)
    return header, 8 + length


class LineReader:
    """Reads the complete lines of a growing file, a bounded number of bytes at a time.

    Args:
        max_bytes: of the file; what lies beyond is not read.
        max_line_bytes: longer lines are skipped.
    """

    def __init__(self, path: Path, *, max_bytes: int, max_line_bytes: int) -> None:
        self._path, self._max_bytes, self._max_line_bytes = path, max_bytes, max_line_bytes
        self._offset = 0
        self.num_skipped = 0
        """Lines that were too long."""

    def lines(self) -> Iterator[bytes]:
        """Yield the complete lines written since the last call, without their ends.

        Raises: OSError as `read_file`; ValueError if the file is larger than `max_bytes`.
        """
        with os.fdopen(open_file(self._path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > self._max_bytes:
                raise ValueError(f"{self._path.name} has {size} bytes; forge reads at most {self._max_bytes} of it")
            file.seek(self._offset)
            is_too_long = False
            while line := file.readline(self._max_line_bytes + 1):
                if not line.endswith(b"\n"):
                    if len(line) <= self._max_line_bytes:
                        break  # not complete yet
                    is_too_long = True
                elif is_too_long or len(line) - 1 > self._max_line_bytes:
                    self._offset, self.num_skipped, is_too_long = file.tell(), self.num_skipped + 1, False
                else:
                    self._offset = file.tell()
                    yield line[:-1]


def require_direct_url(url: str) -> None:
    """Check that a URL names files, and not a file that says where they are and expands templates (fsspec's
    `reference`): with one, a run folder would choose any file of this machine to be read, and how much of it.

    Raises: ValueError.
    """
    schemes = [part.partition("://")[0] for part in url.split("::")]
    if "reference" in schemes:
        raise ValueError("the file system `reference` is not supported: it reads files that another file names")


def file_name(value: Any) -> str:
    """Return a value that is the name of a file within a folder. Raises: ValueError if it may lead elsewhere."""
    if not isinstance(value, str):
        raise ValueError(f"expected the name of a file, found {_kind(value)}")
    is_plain = value not in ("", ".", "..") and "/" not in value and value.isprintable()
    if not is_plain or len(value.encode(errors="replace")) > _MAX_NAME_BYTES:
        raise ValueError(f"{value[:80]!r} is not the name of a file")
    return value


def from_record(kind: type[_Record], record: Any, *, nan_for_null: bool = False) -> _Record:
    """Build a dataclass from a JSON object, and check every value against the type of its field.

    Lists become tuples. Numbers are finite and integers below 2⁶³. A value that has the class of its field already
    is kept, such as one that another reader has built.

    Args:
        nan_for_null: a null where a number is expected becomes nan.

    Raises: ValueError naming the key and what is wrong with it.
    """
    return cast(_Record, _build(kind, record, where="", nan_for_null=nan_for_null))


def typed(hint: Any, value: Any, *, where: str = "", nan_for_null: bool = False) -> Any:
    """Return a JSON value as a type such as `int`, `str | None`, `tuple[float, ...]` or a dataclass.

    Args:
        where: the key of the value, for the message.
        nan_for_null: as for `from_record`.

    Raises: ValueError naming the key and what is wrong with it.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    match origin or hint:
        case typing.Any:
            return value
        case typing.Union | types.UnionType:
            return _one_of(hint, value, where=where, nan_for_null=nan_for_null)
        case typing.Literal if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        case builtins.tuple | builtins.list | collections.abc.Sequence if isinstance(value, (list, tuple)):
            items = arguments if origin is tuple and arguments[1:] != (...,) else arguments[:1] * len(value)
            if len(items) != len(value):
                raise ValueError(f"{where or 'the list'}: expected {len(items)} values, found {len(value)}")
            pairs = zip(items, value, strict=True)
            found = [typed(item, each, where=where, nan_for_null=nan_for_null) for item, each in pairs]
            return found if origin is list else tuple(found)
        case builtins.dict | collections.abc.Mapping if isinstance(value, dict):
            item = arguments[1] if arguments else Any
            return {
                key: typed(item, each, where=_join(where, key), nan_for_null=nan_for_null)
                for key, each in value.items()
            }
        case builtins.type() if origin is None and hint not in _SCALARS and isinstance(value, hint):
            return value
        case _ if dataclasses.is_dataclass(hint):
            return _build(cast(type[Any], hint), value, where=where, nan_for_null=nan_for_null)
        case _ if _is_scalar(hint, value):
            return float(value) if hint is float else value
        case builtins.float if value is None and nan_for_null:
            return math.nan
    raise ValueError(f"{where or 'the value'}: expected {_type_name(hint)}, found {_kind(value)}")


def _build(kind: type[Any], record: Any, *, where: str, nan_for_null: bool) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{where or kind.__name__}: expected a JSON object, found {_kind(record)}")
    hints = _field_types(cast(Any, kind))
    if unknown := record.keys() - hints.keys():
        raise ValueError(f"unknown key '{_join(where, min(unknown))[:120]}'")
    values = {
        name: typed(hint, record[name], where=_join(where, name), nan_for_null=nan_for_null)
        for name, hint in hints.items()
        if name in record
    }
    try:
        return kind(**values)
    except TypeError:
        missing = next((name for name in hints if name not in record and not _has_default(kind, name)), "")
        raise ValueError(f"'{_join(where, missing)}' is missing") from None


def _one_of(hint: Any, value: Any, *, where: str, nan_for_null: bool) -> Any:
    """Return a value as the first type of a union that it has; None only where the union contains it."""
    choices = typing.get_args(hint)
    if value is None and type(None) in choices:
        return None
    problems = []
    for choice in choices:
        if choice is not type(None):
            try:
                return typed(choice, value, where=where, nan_for_null=nan_for_null)
            except ValueError as error:
                problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    raise ValueError(f"{where or 'the value'}: expected {_type_name(hint)}, found {_kind(value)}")


def _is_scalar(hint: Any, value: Any) -> bool:
    """Whether a value is of a scalar type; every finite number is a float, and no bool is a number."""
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return hint in (int, float) and -MAX_INT < value < MAX_INT
    return hint is float and isinstance(value, float) and math.isfinite(value)


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _has_default(kind: type[Any], name: str) -> bool:
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    return not (field.default is field.default_factory is dataclasses.MISSING)


def _match(parts: Sequence[str], pattern: str) -> bool:
    """Whether a whole path matches a pattern; `PurePath.match` compares its end only."""
    patterns = pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _resolves_into(link: Path, root: Path) -> bool:
    try:
        return link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # it leads to itself
        return False


def _require_depth(value: Any, max_depth: int) -> None:
    """Raises: ValueError if lists and objects are nested deeper than this. Goes level by level, not recursively."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(max_depth):
        items = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in items if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"the JSON is nested deeper than {max_depth} levels")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _type_name(hint: Any) -> str:
    return (
        hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
    )


def _kind(value: Any) -> str:
    """Describe a JSON value in a few characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else repr(value)[:60]
    return f"{type(value).__name__} {text}" if value is not None else text
