"""Find secrets in the environment, and remove their values from text before it is written, logged or shown.

Which variables are secrets is decided by their names alone. A secret rarely appears exactly as it is set: a message
may contain it percent-encoded in a URL, as base64 in a header, escaped in JSON or in a traceback, as one line of a
key file, or cut short at its end. All of these are replaced by `***`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, TextIO, cast
from urllib.parse import quote, quote_plus

CREDENTIAL_PREFIXES = ("WANDB_", "MLFLOW_", "AWS_", "AZURE_", "GOOGLE_", "GCS_", "HF_")
"""Variables of storage and tracking, most of which are credentials or name them."""
_PLAIN_NAMES = frozenset(
    [
        *("AWS_REGION", "AWS_DEFAULT_REGION", "GOOGLE_CLOUD_PROJECT", "HF_HOME", "WANDB_ENTITY", "WANDB_PROJECT"),
        *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    ]
)
_PLAIN_SUFFIXES = ("_FILE", "_DIR", "_PATH", "_PROFILE", "_SOCK", "_MODE", "GOOGLE_APPLICATION_CREDENTIALS")
"""Endings of names whose values are places or choices, not secrets."""
_SECRET_WORD = re.compile(
    r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|CONNECTION_?STRING|(API|ACCESS|PRIVATE|SIGNING|MASTER)_?KEY"
    r"|TOKEN(?!I[SZ]|S($|_))|KEYS?\d*($|_)"
    r"|(^|_)(PASS|PWD?|PW|CREDS?|AUTH|BEARER|COOKIES?|JWT|PAT|SAS|DSN|PRIVATE|SIGNATURE)\d*($|_)"
)
MIN_CHARS = 8
"""Shorter values are not secrets, and would match parts of ordinary text."""
_MASK = "***"


def is_secret_variable(name: str) -> bool:
    """Whether the value of an environment variable is a secret, by its name, such as `MINIO_SECRET_KEY`."""
    name = name.upper()
    return _SECRET_WORD.search(name) is not None and not name.endswith(_PLAIN_SUFFIXES) and name != "PWD"


def is_credential(name: str) -> bool:
    """Whether an environment variable must not be copied into a file: a secret, or of storage or tracking."""
    upper = name.upper()
    is_of_service = upper.startswith(CREDENTIAL_PREFIXES) and upper not in _PLAIN_NAMES
    return is_of_service or (_SECRET_WORD.search(upper) is not None and upper != "PWD")


def redacted(text: str, environment: Mapping[str, str]) -> str:
    """Replace the values of the environment's secrets in `text` by `***`, in every usual encoding."""
    values = _secret_values(environment)
    if not values or len(text) < MIN_CHARS:
        return text
    text = _pattern(values).sub(_MASK, text)
    for value in values:
        text = _without_cut_secret(text, value)
    return text


def secret_ranges(text: str, environment: Mapping[str, str]) -> list[tuple[int, int]]:
    """Return where the values of the environment's secrets are in `text`, as [start, stop) of characters."""
    values = _secret_values(environment)
    return [found.span() for found in _pattern(values).finditer(text)] if values and text else []


def redacted_values(value: Any, environment: Mapping[str, str]) -> Any:
    """Redact every string in lists and mappings, before they are encoded as JSON; keys stay as they are."""
    if isinstance(value, str):
        return redacted(value, environment)
    if isinstance(value, Mapping):
        return {key: redacted_values(item, environment) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_values(item, environment) for item in value]
    return value


class RedactingStream:
    """A text stream, such as `sys.stderr`, that redacts each line before it is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""
        self._lock = threading.RLock()
        # A thread that held the lock while another forked does not exist in the child.
        os.register_at_fork(after_in_child=self._renew_lock)

    def write(self, text: str) -> int:
        """Write the complete lines, and keep the start of an incomplete one."""
        with self._lock:
            lines, newline, self._line = (self._line + text).rpartition("\n")
            if newline:
                self._stream.write(redacted(lines, os.environ) + newline)
        return len(text)

    def flush(self) -> None:
        """Write an incomplete line too."""
        with self._lock:
            if self._line:
                self._stream.write(redacted(self._line, os.environ))
                self._line = ""
            self._stream.flush()

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()


def redact_output() -> None:
    """Redact what this process's Python code prints from now on; output of native code is not seen."""
    if not isinstance(sys.stdout, RedactingStream):
        sys.stdout = cast(TextIO, RedactingStream(sys.stdout))
        sys.stderr = cast(TextIO, RedactingStream(sys.stderr))


def _secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        sorted(value for name, value in environment.items() if len(value) >= MIN_CHARS and is_secret_variable(name))
    )


@lru_cache(maxsize=8)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    forms = {form for value in values for part in _parts(value) for form in _forms(part) if len(form) >= MIN_CHARS}
    ordered = sorted(forms, key=lambda form: (-len(form), form))
    # Percent-encoding has upper-case or lower-case digits.
    return re.compile("|".join(re.sub("%([0-9A-F]{2})", r"%(?i:\1)", re.escape(form)) for form in ordered))


def _parts(value: str) -> Iterator[str]:
    """Yield a secret, its lines, and if it is a JSON document, such as a service account, the secrets in it."""
    yield value
    yield value.strip()
    yield from (line.strip() for line in value.splitlines())
    if value.lstrip().startswith("{"):
        try:
            body = json.loads(value)
        except (ValueError, RecursionError):
            return
        for name, inner in body.items():
            if isinstance(inner, str) and is_secret_variable(name):
                yield inner
                yield from (line.strip() for line in inner.splitlines())


def _forms(value: str) -> Iterator[str]:
    """Yield the ways in which a value may be written."""
    yield value
    yield from (quote(value, safe=""), quote(value), quote_plus(value))
    yield from (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1])
    content = value.encode(errors="surrogateescape")
    yield content.hex()
    for encoded in (base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()):
        yield from (encoded, encoded.rstrip("="))
    for before in range(3):  # base64 of a longer text, such as `user:secret`, depends on what precedes the value
        encoded = base64.b64encode(bytes(before) + content).decode()
        # The first characters also encode what precedes, the last ones what follows.
        whole = encoded[-(-before * 8 // 6) : (before + len(content)) * 8 // 6]
        yield from (whole, whole.replace("+", "-").replace("/", "_"))


def _without_cut_secret(text: str, value: str) -> str:
    """Remove the beginning of a secret from the end of a text that was cut there."""
    body = text.rstrip("….")
    for size in range(min(len(value) - 1, len(body)), MIN_CHARS - 1, -1):
        if body.endswith(value[:size]):
            return body[: len(body) - size] + _MASK + text[len(body) :]
    return text
