"""Select the environment variables that a run needs as secrets, and keep their values out of files and logs."""

from __future__ import annotations

from collections.abc import Mapping

_PREFIXES = ("WANDB_", "AWS_", "AZURE_", "GOOGLE_", "GCS_", "HF_")
# Specific to a machine: instance metadata and container credentials are not forwarded.
_MACHINE_WORDS = ("METADATA", "CONTAINER")
# Names of files and profiles of the client machine, which do not exist on another.
_LOCAL_SUFFIXES = ("_FILE", "_DIR", "_PROFILE", "_PATH", "GOOGLE_APPLICATION_CREDENTIALS")
_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "CONNECTION_STRING")
_MIN_CHARS = 8
"""Shorter values are not secrets, and would match parts of ordinary text."""


def credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that storage and tracking need: credentials and endpoints."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_PREFIXES)
        and not name.endswith(_LOCAL_SUFFIXES)
        and not any(word in name for word in _MACHINE_WORDS)
    }


def without_keys(environment: Mapping[str, str], *, prefixes: tuple[str, ...]) -> dict[str, str]:
    """Leave out the keys of a cloud: variables with one of its prefixes that sound like a secret."""
    return {
        name: value
        for name, value in environment.items()
        if not (name.startswith(prefixes) and any(word in name for word in _WORDS))
    }


def redacted(text: str, environment: Mapping[str, str]) -> str:
    """Replace the values of the environment's secrets in `text` by `***`."""
    for name, value in credentials(environment).items():
        if len(value) >= _MIN_CHARS and any(word in name for word in _WORDS):
            text = text.replace(value, "***")
    return text
