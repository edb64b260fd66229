"""The results of a shard map: one file for each shard, written atomically, with a digest of what it depends on.

A file is complete or absent after a kill at any moment. Its first line has the digest of the shard's inputs and of
its second line, the result as JSON. The bytes depend on inputs and result alone, not on workers or time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import RunError
from forge.foreign import parse_object, read_file
from forge.fs import write_atomic

_MAX_BYTES = 256 * 2**20
_TEMPORARY = re.compile(r"\.shard-\d+\.jsonl\..*\.tmp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFiles:
    """The results in one folder."""

    folder: Path
    digest: str
    """Of everything but a shard's inputs that results depend on: model, task, versions."""

    def prepare(self) -> None:
        """Create the folder, and remove what a killed writer has left. Raises: RunError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise RunError(f"cannot store results in {self.folder}: {error.strerror}") from error

    def inputs_digest(self, inputs: Any) -> str:
        """The digest of a shard's inputs, together with everything else that its result depends on."""
        return hashlib.blake2b(f"{self.digest}\n{_json(inputs)}".encode(), digest_size=16).hexdigest()

    def read(self, number: int, *, inputs_digest: str) -> Any:
        """Return a shard's result; None if there is none, or one of other inputs, or it is damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            head, result = read_file(self._path(number), max_bytes=_MAX_BYTES).splitlines()
            if parse_object(head) == self._head(inputs_digest, result):
                return json.loads(result)
        return None

    def write(self, number: int, result: Any, *, inputs_digest: str) -> None:
        """Store a shard's result. Raises: RunError if the disk does not take it."""
        line = _json(result).encode()
        try:
            write_atomic(self._path(number), _json(self._head(inputs_digest, line)).encode() + b"\n" + line + b"\n")
        except OSError as error:
            raise RunError(f"cannot store a result in {self.folder}: {error.strerror}") from error

    def read_all(self, num_shards: int) -> Iterator[Any]:
        """The results of a finished map in the order of its shards. Raises: RunError if one is missing."""
        for number in range(num_shards):
            try:
                _, result = read_file(self._path(number), max_bytes=_MAX_BYTES).splitlines()
                yield json.loads(result)
            except (OSError, ValueError) as error:
                raise RunError(f"cannot read the result of shard {number}: {error}") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.jsonl"

    @staticmethod
    def _head(inputs_digest: str, result: bytes) -> dict[str, str]:
        return {"inputs": inputs_digest, "result": hashlib.blake2b(result, digest_size=16).hexdigest()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
