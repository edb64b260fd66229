"""API keys: read from the environment or from a file, kept as SHA-256 digests, compared in constant time.

Keys are random (`forge serve key` makes them), so a plain digest cannot be reversed by guessing, and a request
costs one digest. The file has one table per key:

    [alice]
    sha256 = "9f86d081884c7d65…"     # hex digest of the key
    requests_per_minute = 60
    tokens_per_minute = 100_000      # of prompts and answers
    seconds_per_request = 60
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, printable
from forge.foreign import read_file
from forge.fs import write_atomic

KEYS_VARIABLE = "FORGE_SERVE_API_KEYS"
"""Environment variable with one or several keys, separated by commas."""
_PREFIX = "forge-"
_MIN_CHARS = 20
"""A shorter key could be guessed."""
_MAX_FILE_BYTES = 2**20
_RETRY_S = 1.0
_MAX_LIMIT = 1e15
"""An integer of TOML may be too large for a float."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What one key may use; None means no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Of prompts and answers together."""
    seconds_per_request: float | None = None
    """An answer is cut there, as at `max_tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key that is let in."""

    name: str
    """Stands in logs and metrics."""
    sha256: str = field(repr=False)
    limits: KeyLimits = field(default_factory=KeyLimits)


def new_key() -> str:
    """Return a random key of 256 bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """Return what is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def table_of(name: str, *, key: str) -> str:
    """Return a key's entry in a file of keys. Raises: ArgumentError if that is not a name."""
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"'{printable(name, limit=64)}' is not a key's name: letters, digits and _ . -")
    quoted = f'"{name}"' if "." in name else name
    return f'[{quoted}]\nsha256 = "{digest_of(key)}"\n'


def add_key(path: Path, *, name: str, key: str) -> None:
    """Append a key's digest to a file of keys, which is made if there is none.

    Raises: ArgumentError if the file is wrong or has a key of this name.
    """
    table = table_of(name, key=key)
    known = read_keys(path, limits=KeyLimits()) if path.exists() else ()
    if name in (each.name for each in known):
        raise ArgumentError(f"{path} has a key '{name}'; remove its table first, or choose another name")
    try:
        before = path.read_text(encoding="utf-8").rstrip() if known else ""
        write_atomic(path, (f"{before}\n\n" if before else "") + table, mode=0o600)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror}") from error


def find_key(keys: tuple[ApiKey, ...], *, presented: str) -> ApiKey | None:
    """Return the key that a client presents; the time does not depend on which one it resembles."""
    digest, found = digest_of(presented), None
    for key in keys:
        if hmac.compare_digest(digest, key.sha256):
            found = key
    return found


def keys_of_environment(environment: Mapping[str, str], *, limits: KeyLimits) -> tuple[ApiKey, ...]:
    """Read the keys of `FORGE_SERVE_API_KEYS`. Raises: ArgumentError if one is short enough to be guessed."""
    given = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    short = [key for key in given if len(key) < _MIN_CHARS]
    if short:
        raise ArgumentError(
            f"{KEYS_VARIABLE} has a key of {len(short[0])} characters, which could be guessed; a key needs "
            f"{_MIN_CHARS} or more: forge serve key"
        )
    return tuple(
        ApiKey(name=f"key-{number}", sha256=digest_of(key), limits=limits)
        for number, key in enumerate(given, start=1)
    )


def read_keys(path: Path, *, limits: KeyLimits) -> tuple[ApiKey, ...]:
    """Read a file of keys.

    Args:
        limits: for what a key's table does not say.

    Raises: ArgumentError if the file cannot be read, is writable by other users, or has an invalid key or limit.
    """
    try:
        file = path.resolve()  # a secret of Kubernetes is a link
        if file.stat().st_mode & 0o022:
            raise ArgumentError(f"{path} is writable by other users, who could add keys: chmod go-w {path}")
        content = read_file(file, max_bytes=_MAX_FILE_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArgumentError(f"the file of keys {path} cannot be read: {reason}") from error
    except ValueError as error:
        raise ArgumentError(f"the file of keys is too large: {error}") from error
    try:
        tables = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} is not TOML: {printable(str(error), limit=200)}") from error
    return tuple(_key(name, table, path=path, limits=limits) for name, table in tables.items())


def _key(name: str, table: Any, *, path: Path, limits: KeyLimits) -> ApiKey:
    where = f"{path}: [{printable(name, limit=64)}]"
    known = {"sha256", *(each.name for each in fields(KeyLimits))}
    if not _NAME.fullmatch(name) or not isinstance(table, dict):
        raise ArgumentError(f"{where} must be a table with a name of letters, digits and _ . -")
    if unknown := sorted(set(table) - known):
        raise ArgumentError(
            f"{where} has the unknown key {printable(unknown[0], limit=64)}; known: {sorted(known)}"
        )
    digest = table.pop("sha256", None)
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ArgumentError(f"{where}: sha256 must be the key's digest, 64 hex digits: forge serve key {name}")
    for limit, value in table.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MAX_LIMIT:
            raise ArgumentError(f"{where}: {limit} must be a positive number, at most {_MAX_LIMIT:g}")
    own = KeyLimits(**({each.name: getattr(limits, each.name) for each in fields(KeyLimits)} | table))
    return ApiKey(name=name, sha256=digest, limits=own)


class KeyRing:
    """The keys in force. A file is read again when it has changed, so that a key can be revoked at once."""

    def __init__(self, keys: tuple[ApiKey, ...], *, file: Path | None = None, limits: KeyLimits) -> None:
        """Raises: ArgumentError if the file is wrong."""
        self._fixed, self._file, self._limits = keys, file, limits
        self._stamp: object = None
        self._wrong: object = ()
        self._retry_at = 0.0
        self._read: tuple[ApiKey, ...] = ()
        self.refresh()

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return not self._fixed and self._file is None

    def find(self, authorization: str | None) -> ApiKey | None:
        """Return the key of an `Authorization` header; None if it has none that is in force."""
        scheme, _, presented = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            return None
        return find_key(self._fixed + self._read, presented=presented.strip())

    def refresh(self) -> None:
        """Read the file again if it has changed. Raises: ArgumentError, with the former keys still in force.

        A file that cannot be read, or is wrong, is reported once a second and not for each request.
        """
        if self._file is None:
            return
        try:
            status = self._file.stat()
            stamp: object = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
        except OSError:
            stamp = None
        is_same = stamp is not None and stamp == self._stamp
        if is_same or (stamp == self._wrong and time.monotonic() < self._retry_at):
            return
        try:
            self._read, self._stamp = read_keys(self._file, limits=self._limits), stamp
        except ArgumentError:
            self._wrong, self._retry_at = stamp, time.monotonic() + _RETRY_S
            raise
