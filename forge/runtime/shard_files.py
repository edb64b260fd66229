"""The results of a shard map: one file for each shard, written atomically and named by a digest of its inputs.

A file is complete or absent after a kill at any moment. Its first line has a digest of its second line, which is
the result as JSON. Name and bytes depend on inputs and result alone, not on workers, time or other shards of a map.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, RunError
from forge.foreign import parse_json, parse_object, read_file
from forge.fs import write_atomic

_MAX_BYTES = 256 * 2**20
_LOCK = ".lock"
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.jsonl\..*\.tmp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFiles:
    """The results in one folder."""

    folder: Path
    digest: str
    """Of everything but a shard's inputs that results depend on: model, task, versions."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from computing these results. The lock ends with this process, however it ends.

        Raises: ArgumentError if another process has it; RunError if the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RunError(f"cannot store results in {self.folder}: {error.strerror}") from error
        with os.fdopen(handle):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArgumentError(
                    f"another process computes the results in {self.folder}; wait for it, or end it"
                ) from None
            yield

    def prepare(self) -> None:
        """Create the folder, and remove what a killed writer has left. Raises: RunError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise RunError(f"cannot store results in {self.folder}: {error.strerror}") from error

    def key(self, inputs: Any) -> str:
        """The name of a shard's result: a digest of its inputs and of all else that the result depends on."""
        return hashlib.blake2b(f"{self.digest}\n{_json(inputs)}".encode(), digest_size=16).hexdigest()

    def read(self, key: str) -> Any:
        """Return a result; None if there is none, or it is damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            head, result = read_file(self._path(key), max_bytes=_MAX_BYTES).splitlines()
            if parse_object(head) == _head(result):
                return parse_json(result)
        return None

    def write(self, key: str, result: Any) -> None:
        """Store a result. Raises: RunError if the disk does not take it."""
        line = _json(result).encode()
        try:
            write_atomic(self._path(key), _json(_head(line)).encode() + b"\n" + line + b"\n")
        except OSError as error:
            raise RunError(f"cannot store a result in {self.folder}: {error.strerror}") from error

    def read_all(self, shards: Iterable[Any]) -> Iterator[Any]:
        """The results of a finished map, in the order of the inputs. Raises: RunError if one is missing."""
        for inputs in shards:
            found = self.read(self.key(inputs))
            if found is None:
                raise RunError(f"a result in {self.folder} was removed or changed; start it again")
            yield found

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"


def _head(result: bytes) -> dict[str, str]:
    return {"digest": hashlib.blake2b(result, digest_size=16).hexdigest()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
